#!/bin/sh
# Build the wheel and use it from a clean virtual environment per extra.
set -eu
PYTHON=${PYTHON:-python3}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

"$PYTHON" -m build --wheel --outdir "$folder" . >"$folder/build.log" 2>&1 || {
    cat "$folder/build.log"
    exit 1
}
wheel=$(ls "$folder"/*.whl)

# smoke EXTRA COMMAND...: the command must work with that extra alone, away from the source tree.
smoke() {
    extra=$1
    shift
    "$PYTHON" -m venv "$folder/$extra"
    "$folder/$extra/bin/python" -m pip install --quiet --disable-pip-version-check "$wheel[$extra]"
    (cd "$folder" && PATH="$folder/$extra/bin:$PATH" "$@" >"$folder/$extra.log" 2>&1) || {
        echo "wheel: the extra \"$extra\" failed: $*"
        cat "$folder/$extra.log"
        exit 1
    }
    rm -rf "${folder:?}/$extra"
    echo "wheel: the extra \"$extra\" works"
}

engine='from edge_ll.engine.runtime import runtime_name; print(runtime_name())'
smoke device sh -c "edge-ll-agent --help && edge-ll --help && python -c '$engine'"
smoke device-ort-training python -c \
    "$engine; from edge_ll.engine.ort_training import is_available; assert is_available()"
smoke fleet edge-ll devices --data nowhere
smoke export sh -c \
    "edge-ll train --help && python -c 'import edge_ll_export.pack, edge_ll_export.data.digits as d; d.load_digits()'"
