"""``edge-ll-agent``: run the agent, ask how it is, and try a bundle by hand."""

from __future__ import annotations

import argparse
import secrets
import signal
import sys
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import msgspec

from edge_ll import config
from edge_ll.terminal import FAILED, OK, add_common, run_verb
from edge_ll_device.config import Provider

if TYPE_CHECKING:
    import numpy.typing as npt

    from edge_ll_device.student import Student


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb; its exit code, see :func:`edge_ll.terminal.run_verb`."""
    return run_verb(_parser().parse_args(argv))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="edge-ll-agent", description="The edge_ll agent: a student that learns on this device."
    )
    add_common(parser)
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB")
    run = _verb(verbs, "run", "run the agent until it is told to stop", _run,
                "edge-ll-agent run --config agent.toml")  # fmt: skip
    run.add_argument("--config", type=Path, required=True, help="the agent's TOML file")
    status = _verb(verbs, "status", "what the agent runs, learned, and why it learns or not",
                   _status, "edge-ll-agent status --config agent.toml --json")  # fmt: skip
    status.add_argument("--config", type=Path, required=True, help="the agent's TOML file")
    status.add_argument("--json", action="store_true", help="one JSON object")
    predict = _verb(verbs, "predict", "predict samples with a bundle", _predict,
                    "edge-ll-agent predict my.bundle --trust key.pub --input x.npy")  # fmt: skip
    _bundle_arguments(predict)
    samples = predict.add_mutually_exclusive_group(required=True)
    samples.add_argument("--input", type=Path, help=".npy file, [N, *input]")
    samples.add_argument(
        "--text", action="append", help="a text, for a student that reads; may be repeated"
    )
    learn = _verb(verbs, "learn", "learn a recorded stream, without a fleet", _learn,
                  "edge-ll-agent learn digits.bundle --trust key.pub --stream s.npz")  # fmt: skip
    _bundle_arguments(learn)
    learn.add_argument("--stream", type=Path, required=True, help=".npz: x, label, experience")
    learn.add_argument("--no-replay", action="store_true", help="learn naively, and forget")
    return parser


def _verb(verbs: Any, name: str, text: str, run: Any, example: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(
        name, help=text, description=text, epilog=f"example: {example}"
    )
    parser.set_defaults(run=run)
    return parser


def _bundle_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, help="a signed bundle")
    parser.add_argument("--trust", type=Path, required=True, help="public key (*.pub)")
    parser.add_argument("--engine", choices=("auto", "step-graph", "ort-training"), default="auto")
    parser.add_argument(
        "--provider", action="append", choices=get_args(Provider), dest="providers",
        help="execution provider; again for the next best (cpu)",
    )  # fmt: skip
    parser.add_argument("--threads", type=_at_least(1), default=1)
    parser.add_argument("--seed", type=_at_least(0), default=0)
    parser.add_argument("--json", action="store_true", help="one JSON object")


def _at_least(low: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if int(text) < low:
            raise ValueError
        return int(text)

    number.__name__ = f"integer of at least {low}"
    return number


def _run(arguments: argparse.Namespace) -> int:
    from edge_ll.transport.mqtt import MqttTransport
    from edge_ll.trust import TrustStore
    from edge_ll_device.agent import Agent, last_will
    from edge_ll_device.config import AgentConfig
    from edge_ll_device.store import Store

    settings = config.load(arguments.config, AgentConfig)
    session = secrets.token_hex(8)
    transport = MqttTransport(
        settings.broker.url,
        client_id=f"edge-ll:{settings.tenant}:{settings.device}",
        will=last_will(settings, session),
        keepalive_s=settings.broker.keepalive_s,
    )
    store = Store(settings.state_path, TrustStore.from_hex(settings.trusted_keys))
    agent = Agent(settings, transport, store, session=session)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: agent.stop())
    try:
        agent.run()
    finally:
        transport.close()
    return OK


def _status(arguments: argparse.Namespace) -> int:
    from edge_ll_device.config import AgentConfig
    from edge_ll_device.store import read_status

    settings = config.load(arguments.config, AgentConfig)
    status = read_status(settings.state_path)
    if status is None:
        print(f"the agent has not run yet: {settings.state_path} holds no status", file=sys.stderr)
        return FAILED
    if arguments.json:
        print(msgspec.json.encode(status).decode())
        return OK
    for key, value in status.items():
        print(f"{key.replace('_', ' '):18} {_plain(value)}")
    return OK


def _predict(arguments: argparse.Namespace) -> int:
    from edge_ll.tokenizer import bundle_tokenizer

    student = _student(arguments, replay=True)
    if arguments.text:
        x = bundle_tokenizer(student.bundle)(arguments.text)
    else:
        x = _samples(arguments.input)
    for sample in x:
        student.learner.check(sample, None)
    classes, confidences = student.learner.predict(student.learner.encode(x))
    labels = student.bundle.manifest.labels
    answers = [
        {"label": labels[c], "confidence": round(float(p), 4)}
        for c, p in zip(classes, confidences, strict=True)
    ]
    if arguments.json:
        print(msgspec.json.encode({"predictions": answers}).decode())
    else:
        for number, answer in enumerate(answers):
            print(f"{number:6}  {answer['label']:16} {answer['confidence']:.4f}")
    return OK


def _samples(path: Path) -> npt.NDArray[Any]:
    import numpy as np

    from edge_ll.errors import DataError

    try:
        x = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: expected an .npy array: {error}") from error
    if not isinstance(x, np.ndarray) or not x.ndim:
        raise DataError(f"{path}: expected one array of samples [N, *input]")
    return x


def _learn(arguments: argparse.Namespace) -> int:
    from edge_ll_device.offline import learn_stream
    from edge_ll_device.source import RecordedStream

    student = _student(arguments, replay=not arguments.no_replay)
    result = learn_stream(student, RecordedStream(arguments.stream))
    if arguments.json:
        print(msgspec.json.encode(result).decode())
        return OK
    for number, row in enumerate(result["anchors"]):
        cells = "  ".join(f"{name} {counts.accuracy:.3f}" for name, counts in row.items())
        print(f"after experience {number}:  {cells}")
    print(f"seen {result['seen']}, learned {result['learned']}, refused {result['refused']}")
    print(f"drift alarm: {'yes' if result['drift'] else 'no'}")
    return OK


def _student(arguments: argparse.Namespace, *, replay: bool) -> Student:
    from edge_ll.bundle import Bundle
    from edge_ll.engine.load import open_engine
    from edge_ll.trust import TrustStore
    from edge_ll_device.config import LearningConfig
    from edge_ll_device.student import Student

    trust = TrustStore.from_file(arguments.trust)
    bundle = Bundle.open(arguments.bundle, trust)
    engine = open_engine(
        bundle,
        arguments.engine,
        providers=tuple(arguments.providers or ("cpu",)),
        threads=arguments.threads,
    )
    return Student(bundle, engine, LearningConfig(replay=replay, seed=arguments.seed))


def _plain(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}={_plain(item)}" for key, item in value.items())
    if isinstance(value, list):
        apart = "; " if any(isinstance(item, dict) for item in value) else " "
        return apart.join(_plain(item) for item in value)
    if isinstance(value, float):
        return f"{value:.4g}"
    return "-" if value is None else str(value)


if __name__ == "__main__":
    sys.exit(main())
