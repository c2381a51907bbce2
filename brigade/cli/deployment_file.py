"""Reads deploy.yaml into plain values and the lines they stand on, then into a Deployment. Must not start anything.

YAML, but only what a settings file needs: mappings, lists, text, whole and decimal numbers, true, false and null.
Anchors, aliases and tags are refused, so no file can build objects or grow while it is read. Plain words are read as
YAML 1.2 does: `no` and `on` are text, 010 is ten, and nothing becomes a date or a number of minutes.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from brigade.cli.fault import Fault
from brigade.spec.deploy import BadDeployment, Deployment, deployment_from, shown
from brigade.spec.deploy import Path as Where

if TYPE_CHECKING:
    import yaml

MOST_BYTES = 1 << 18
MOST_DEPTH = 16
_INT = re.compile(r"[-+]?\d{1,18}")
_FLOAT = re.compile(r"[-+]?(?:\d+\.\d*|\.\d+|\d+)(?:[eE][-+]?\d+)?")
_WORDS: dict[str, bool | None] = {"true": True, "false": False, "null": None, "~": None, "": None}


def read_deployment(path: Path) -> Deployment:
    """The deployment of a file. Raises Fault (exit code 2) with the file, the line, the key and what to do."""
    try:
        data, line_of = parse(read_text(path), str(path))
        return deployment_from(data, str(path), line_of)
    except BadDeployment as e:
        raise Fault(str(e), 2) from e


def read_text(path: Path) -> str:
    """The file's text. Raises BadDeployment."""
    try:
        if path.exists() and not path.is_file():
            raise BadDeployment(f"{path}: is not a file; name a deployment file, like examples/one_box.yaml")
        with path.open("rb") as file:
            raw = file.read(MOST_BYTES + 1)
        if len(raw) > MOST_BYTES:
            raise BadDeployment(f"{path}: is longer than {MOST_BYTES} bytes, which no deployment needs")
        return raw.decode()
    except OSError as e:
        raise BadDeployment(f"{path}: cannot be read ({e.strerror}); name a deployment file") from e
    except UnicodeDecodeError as e:
        raise BadDeployment(f"{path}: is not UTF-8 text ({e.reason} at byte {e.start}); save it as UTF-8") from e


def parse(text: str, where: str) -> tuple[Any, dict[Where, int]]:
    """Plain values of YAML text, and for each path the line that it starts on. Raises BadDeployment."""
    import yaml

    try:
        _refuse_what_grows(text, where)
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as e:
        at = f":{e.problem_mark.line + 1}" if e.problem_mark else ""
        problem = " ".join(str(p) for p in (e.problem, e.context) if p)
        raise BadDeployment(f"{where}{at}: is not valid YAML: {problem}; look at indentation and quotes there") from e
    except yaml.YAMLError as e:
        raise BadDeployment(f"{where}: is not valid YAML: {e}; save it as plain text") from e
    if node is None:
        raise BadDeployment(f"{where}: is empty; start with 'units:', or look at examples/one_box.yaml")
    line_of: dict[Where, int] = {}
    return _plain(node, (), where, line_of), line_of


def _refuse_what_grows(text: str, where: str) -> None:
    """Checks the flat stream of events, before anything recursive reads the text."""
    import yaml

    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        line = event.start_mark.line + 1 if event.start_mark else 1
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise BadDeployment(f"{where}:{line}: anchors and aliases (& and *) are not read; write the value out")
        if tag := getattr(event, "tag", None):
            raise BadDeployment(f"{where}:{line}: tags ({tag}) are not read; write the plain value")
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > MOST_DEPTH:
            raise BadDeployment(f"{where}:{line}: is nested deeper than {MOST_DEPTH} levels, which no deployment needs")


def _plain(node: "yaml.Node", at: Where, where: str, line_of: dict[Where, int]) -> Any:
    import yaml

    line_of.setdefault(at, node.start_mark.line + 1)
    if isinstance(node, yaml.ScalarNode):
        return _scalar(node.value) if node.style is None else node.value
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, (*at, i), where, line_of) for i, item in enumerate(node.value)]
    out: dict[str, Any] = {}
    for key_node, value in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            raise BadDeployment(f"{where}:{line}: a key must be a plain word")
        key = key_node.value
        path = (*at, key)
        if key in out:
            raise BadDeployment(
                f"{where}:{line}: {shown(path)}: is there twice, first on line {line_of[path]}; keep one of them"
            )
        line_of[path] = line
        out[key] = _plain(value, path, where, line_of)
    return out


def _scalar(text: str) -> Any:
    """A plain word as YAML 1.2 understands it."""
    if text in _WORDS:
        return _WORDS[text]
    if _INT.fullmatch(text):
        return int(text)
    return float(text) if _FLOAT.fullmatch(text) else text
