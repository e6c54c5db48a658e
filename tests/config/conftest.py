"""Fixtures of the tests of dials: a YAML file from text, and the sentence with which a config is refused."""

import pytest

from pipeline.config.parse import parse


@pytest.fixture
def write(tmp_path):
    """Writes a YAML file from its text and returns its path."""

    def write(text: str, name: str = "dials.yaml") -> str:
        (tmp_path / name).write_text(text, encoding="utf-8")
        return str(tmp_path / name)

    return write


@pytest.fixture
def refused(capsys):
    """The one sentence with which `parse` ends the program, status 2."""

    def refused(kind, *argv: str) -> str:
        with pytest.raises(SystemExit) as stopped:
            parse(kind, argv)
        assert stopped.value.code == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("error: ")
        assert err.endswith("\n")
        assert err.count("\n") == 1
        return err.removeprefix("error: ").rstrip("\n")

    return refused
