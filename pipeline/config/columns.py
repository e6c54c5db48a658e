"""The field map of the dial `columns`: which column of a row is which field here, and which are left out on purpose."""

from pipeline.config.errors import ConfigError

FIELDS = (
    "prompt", "completion", "messages", "chosen", "rejected", "margin", "text", "system", "question", "context",
    "response", "label", "source", "role", "content",
)  # fmt: skip
"""Names that a column may be given; the last two are those of a message."""


def parse_columns(text: str) -> dict[str, str]:
    """Of `prompt=question,tools=` {"question": "prompt", "tools": ""}: each column's name here, '' to leave it out.

    Raises ConfigError for an entry of another form, a name that no row has here, and one that stands twice.
    """
    names: dict[str, str] = {}
    for entry in filter(None, (part.strip() for part in text.split(","))):
        ours, equals, theirs = (part.strip() for part in entry.partition("="))
        if not equals or not ours:
            raise ConfigError(f"columns: expected ours=theirs, or theirs= to leave a column out, got '{entry}'")
        if theirs and ours not in FIELDS:
            raise ConfigError(f"columns: {entry}: '{ours}' is no field here; expected one of {', '.join(FIELDS)}")
        if (theirs or ours) in names or (theirs and ours in names.values()):
            raise ConfigError(f"columns: {entry}: expected each name once on each side, got it twice in '{text}'")
        names[theirs or ours] = ours if theirs else ""
    return names
