"""The operator's command ``edge-ll``: one module per family of verbs, imports inside the verbs."""
