"""How fast and how small the training engines are, next to torch and to a peer.

``make bench-engines`` sets everything up and runs :mod:`benchmarks.engines.__main__`. One
environment holds one ONNX Runtime, so each engine is a process of its own; the coordinator asks
them in turn.
"""
