"""What an error must be for a person to act on it."""

import re
import traceback

from experiments.settings.config import ROOT

# Words of Python's own errors about values that nobody has looked at.
JARGON = re.compile(
    r"object has no attribute|not subscriptable|unhashable|unexpected keyword|index out of range"
    r"|not iterable|not supported between|internal error|Traceback|0x[0-9a-f]{6}|<class "
    r"|NoneType|Errno|could not be converted|is not Optional|is not a ListConfig"
    r"|Cannot (merge|assign)"
)
LONGEST = 700


def check_message(text, *words):
    """One line that says what is wrong, without the words of an accident."""
    line = text.strip().split("\n")[0]
    assert 10 < len(line) <= LONGEST, line
    assert not JARGON.search(line), line
    for word in words:
        assert word in line, (word, line)


def check_error(error, *words):
    """The error of a failed cell: raised on purpose, in this project's code."""
    check_message(error["message"], *words)
    frames = re.findall(r'File "([^"]+)", line \d+, in .*(?=\n\s*(.*))', error["traceback"])
    path, line = frames[-1]
    assert path.startswith(str(ROOT)), error["traceback"]
    assert line.startswith("raise"), error["traceback"]


def check_raised(error, *words):
    """The same of an exception."""
    check_message(str(error), *words)
    frame = traceback.extract_tb(error.__traceback__)[-1]
    assert frame.filename.startswith(str(ROOT)), frame
    assert frame.line.startswith("raise"), frame
