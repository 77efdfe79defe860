"""What every exported graph must be, and a way to run one."""

from __future__ import annotations


def run_graph(data: bytes, outputs: list[str], **feeds):
    """The named outputs of a graph, on the runtime that is installed."""
    import onnxruntime

    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    return session.run(outputs, feeds)


def check_portable(data: bytes):
    """Opset 18, IR 10 at most, standard operators only, nothing outside, nothing private."""
    import onnx

    model = onnx.load_from_string(data)
    assert model.ir_version <= 10
    assert [(item.domain, item.version) for item in model.opset_import] == [("", 18)]
    assert {node.domain for node in model.graph.node} == {""}
    assert not model.functions
    assert not any(item.external_data for item in model.graph.initializer)
    assert not any(node.doc_string or node.metadata_props for node in model.graph.node)
    for private in (b"site-packages", b"stack_trace", b"/work/", b"/home/", b"/tmp/"):
        assert private not in data
    return model
