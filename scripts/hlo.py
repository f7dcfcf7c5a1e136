"""Reading the texts of compiled programs: XLA's HLO, and its dumps."""

import itertools
import math
import re

COLLECTIVE = re.compile(
    r"= (?P<shape>.*?) (?P<operation>all-reduce|all-gather|reduce-scatter|all-to-all|ragged-all-to-all"
    r"|collective-permute|collective-broadcast)(?P<start>-start)?\("
)
"""The beginning of an instruction in which devices exchange numbers."""

NO_KERNEL = ("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "while", "partition-id", "replica-id")
"""Operations without a kernel of their own, as those whose name ends with -done."""


def collectives(text: str) -> list[tuple[str, int]]:
    """What the devices exchange: each operation, and the bytes of its result on a device; in a loop, counted once.

    Args:
        text: a compiled program, as ``jax.stages.Compiled.as_text`` returns it.
    """
    found = []
    for match in filter(None, map(COLLECTIVE.search, text.splitlines())):
        shapes = re.findall(r"[a-z]+(\d*)\w*\[([\d,]*)\]", match["shape"])  # such as bf16[2,3], pred[]
        if match["operation"] == "collective-permute" and match["start"]:
            shapes = shapes[1:2]  # after the operand, before what belongs to the implementation
        elif match["operation"] != "all-reduce" and match["start"]:
            shapes = shapes[len(shapes) // 2 :]  # after the operands
        sizes = (int(bits or 8) * math.prod(map(int, filter(None, shape.split(",")))) for bits, shape in shapes)
        found.append((match["operation"], sum(-(-size // 8) for size in sizes)))
    return found


def num_kernels(text: str) -> int:
    """The number of kernels that a GPU launches in an iteration of the program's loop, or without one in all."""
    entry = text[re.search("^ENTRY ", text, flags=re.MULTILINE).start() :]
    loop = re.search(r" while\(.*body=%?([\w.\-]+)", entry)
    head = re.escape(loop[1]) if loop else r"[\w.\-]+"
    start = re.search(rf"^{'' if loop else 'ENTRY '}%?{head} \(.*\{{$", text, flags=re.MULTILINE)
    body = text[start.end() : text.index("\n}", start.end())]
    operations = re.findall(r"^ *(?:ROOT )?%?[\w.\-]+ = .*? ([a-z][a-z\-]*)\(", body, flags=re.MULTILINE)
    return sum(operation not in NO_KERNEL and not operation.endswith("-done") for operation in operations)


def num_launches(thunks: str) -> int | None:
    """The number of launches in an iteration of the loop of a program for GPUs, or without a loop in all.

    Args:
        thunks: XLA's dump of what the host does, where launches within one launch are indented; may be empty.
    """
    lines = [re.match(r"( *)(?:\d+: (k\w+)|condition:|body:)", line) for line in thunks.splitlines()]
    launches = [(len(match[1]), match[2]) for match in filter(None, lines) if match[2]]
    if not launches:
        return None
    loop = next((place for place, (_, kind) in enumerate(launches) if kind == "kWhile"), None)
    if loop is None:
        return sum(indent == launches[0][0] for indent, _ in launches)
    if launches[loop][0] > launches[0][0]:  # the loop is in a command buffer
        return 0
    inside = list(itertools.takewhile(lambda launch: launch[0] > launches[loop][0], launches[loop + 1 :]))
    return sum(indent == inside[0][0] for indent, _ in inside)
