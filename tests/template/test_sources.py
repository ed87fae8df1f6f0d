"""A project is the same whichever way the template is copied, and nobody has to trust it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import copier
import pexpect
import pytest
import yaml
from copier.errors import DirtyLocalWarning

from ..conftest import REPOSITORY
from .conftest import files, git

LINK = "template/src/{{ package_name }}/runtime"
CHANGED = "conf/README.md"


ENTER, DOWN, CLEAR = "\r", "\x1b[B", "\x15"


class Terminal(pexpect.spawn):  # type: ignore[misc]
    """A terminal in which Copier asks its questions."""

    def answer(self, question: str, text: str = "") -> None:
        """Answer a question, with its default when no text is given."""
        self.expect_exact(question)
        self.send(f"{CLEAR}{text}{ENTER}" if text else ENTER)

    def choose(self, question: str, down: int = 0) -> None:
        """Choose the default, or what is so many lines below it; after the last comes the first."""
        self.expect_exact(question)
        self.send(DOWN * down + ENTER)

    def mark(self, question: str, down: int = 0) -> None:
        """Mark one of a list, so many lines below the first."""
        self.expect_exact(question)
        self.send(DOWN * down + " " + ENTER)

    def confirm(self, question: str, answer: str) -> None:
        """Answer with y or n."""
        self.expect_exact(question)
        self.send(answer)


@contextmanager
def terminal(template: Path, folder: Path, *options: str) -> Iterator[Terminal]:
    """Run `copier copy` in a terminal; it has to end well."""
    asked = Terminal(
        sys.executable,
        ["-m", "copier", "copy", *options, str(template), "project"],
        cwd=folder,
        # It can't say where its cursor is.
        env={**os.environ, "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"},
        dimensions=(40, 200),
        encoding="utf-8",
        timeout=120,
    )
    yield asked
    asked.expect(pexpect.EOF)
    asked.close()
    assert asked.exitstatus == 0


def command_line(
    template: Path, folder: Path, *options: str, status: int = 0, quiet: bool = True
) -> str:
    """Run `copier copy` where nobody can be asked; gives what it says of mistakes."""
    options += ("--quiet",) * quiet
    done = subprocess.run(
        [sys.executable, "-m", "copier", "copy", *options, str(template), "project"],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == status, done.stderr
    return done.stderr


def write(folder: Path, contents: dict[str, bytes]) -> None:
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def without_answers(folder: Path) -> dict[str, bytes]:
    """Read a project, without the file that says where it came from."""
    project = files(folder)
    del project[".copier-answers.yml"]
    return project


def copy(source: str | Path, folder: Path, vcs_ref: str | None = None) -> dict[str, bytes]:
    """Generate a project and read it."""
    data = {"project_name": "Penguin Study"}
    copier.run_copy(str(source), folder, data=data, defaults=True, quiet=True, vcs_ref=vcs_ref)
    return without_answers(folder)


@pytest.fixture(scope="module")
def expected(template: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return copy(template, tmp_path_factory.mktemp("plain") / "project")


@pytest.fixture(scope="module")
def repository(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The template as a git repository, one commit past its tag v0.1.0."""
    folder = tmp_path_factory.mktemp("sources") / "km-template"
    shutil.copytree(template, folder)
    shutil.copy(REPOSITORY / ".gitattributes", folder)
    (folder / "runtime").symlink_to(LINK, target_is_directory=True)
    git(folder, "init", "--quiet", "--initial-branch=main")
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message=First version")
    git(folder, "tag", "v0.1.0")
    change(folder)
    git(folder, "commit", "--quiet", "--all", "--message=Change a file")
    return folder


def change(template: Path) -> None:
    with (template / "template" / f"{CHANGED}.jinja").open("a", encoding="utf-8") as file:
        file.write("\nMore.\n")


def with_change(project: dict[str, bytes], times: int = 1) -> dict[str, bytes]:
    return {**project, CHANGED: project[CHANGED] + b"\nMore.\n" * times}


def test_a_plain_folder_gives_a_project(expected: dict[str, bytes]) -> None:
    assert "pyproject.toml" in expected
    assert "src/penguin_study/runtime/__init__.py" in expected


def test_a_repository_gives_its_newest_tag(
    repository: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    assert copy(repository, tmp_path / "project") == expected

    answers = yaml.safe_load((tmp_path / "project/.copier-answers.yml").read_text("utf-8"))
    assert answers["_commit"] == "v0.1.0"


def test_a_tag_can_be_named(repository: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    assert copy(repository, tmp_path / "project", vcs_ref="v0.1.0") == expected


def test_a_branch_can_be_named(
    repository: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    assert copy(repository, tmp_path / "project", vcs_ref="main") == with_change(expected)


def test_a_url_of_a_repository_gives_the_same(
    repository: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    assert copy(f"git+{repository.as_uri()}", tmp_path / "project") == expected


def test_a_change_that_is_not_committed_arrives(
    repository: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    git(tmp_path, "clone", "--quiet", str(repository), "checkout")
    change(tmp_path / "checkout")
    (tmp_path / "checkout" / "template" / "new.txt").write_bytes(b"New.\n")

    with pytest.warns(DirtyLocalWarning):
        project = copy(tmp_path / "checkout", tmp_path / "project", vcs_ref="HEAD")

    assert project == {**with_change(expected, times=2), "new.txt": b"New.\n"}


AS_ON_WINDOWS = {"core.symlinks": "false", "core.autocrlf": "true"}


@pytest.mark.parametrize("kept", ["as a repository", "as a plain folder"])
def test_a_checkout_as_on_windows_gives_the_same(
    repository: Path,
    expected: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kept: str,
) -> None:
    # For Copier's own clone as well.
    monkeypatch.setenv("GIT_CONFIG_COUNT", str(len(AS_ON_WINDOWS)))
    for number, (key, value) in enumerate(AS_ON_WINDOWS.items()):
        monkeypatch.setenv(f"GIT_CONFIG_KEY_{number}", key)
        monkeypatch.setenv(f"GIT_CONFIG_VALUE_{number}", value)
    git(tmp_path, "clone", "--quiet", "--branch=v0.1.0", str(repository), "checkout")
    checkout = tmp_path / "checkout"
    assert not (checkout / "runtime").is_symlink()
    assert (checkout / "runtime").read_text("utf-8") == LINK
    if kept == "as a plain folder":
        shutil.rmtree(checkout / ".git")

    assert copy(checkout, tmp_path / "project") == expected


def test_the_template_has_nothing_to_trust(template: Path, tmp_path: Path) -> None:
    # As Copier reads it, with what it may include from other files.
    found = copier.Worker(str(template), tmp_path, defaults=True, quiet=True).template

    assert not {"tasks", "migrations", "jinja_extensions"} & found.config_data.keys()


ON_THE_COMMAND_LINE = {
    "--data": ["--defaults", "--data=project_name=Penguin Study"],
    "--data-file": ["--defaults", "--data-file=answers.yml"],
}


@pytest.mark.parametrize("options", ON_THE_COMMAND_LINE.values(), ids=ON_THE_COMMAND_LINE)
def test_the_command_line_needs_no_trust(
    template: Path, expected: dict[str, bytes], tmp_path: Path, options: list[str]
) -> None:
    (tmp_path / "answers.yml").write_text("project_name: Penguin Study\n")

    command_line(template, tmp_path, *options)

    assert without_answers(tmp_path / "project") == expected


def test_the_questions_are_asked_in_a_terminal(template: Path, tmp_path: Path) -> None:
    """What an answer makes needless isn't asked, and a wrong one can be mended on the spot."""
    with terminal(template, tmp_path) as asked:
        asked.answer("What is the project called?", "Penguin Study")
        asked.answer("What is its Python package called?", "class")
        asked.expect_exact('"class" is a keyword of Python')
        asked.send(f"{CLEAR}study{ENTER}")
        for question in ("What does it do", "Who writes it?", "At which e-mail address?"):
            asked.answer(question)
        asked.choose("Under which licence?", down=1)
        asked.choose("Include the example", down=1)
        asked.choose("Where are runs kept?", down=1)
        asked.answer("What is the server's address?", "https://mlflow.example.org")
        asked.choose("Where are the files of runs kept?")
        asked.choose("Add a Dockerfile")
        asked.choose("Where are changes checked?", down=1)
        asked.choose("Will its nodes run on more than one machine?")
        asked.mark("Which extras does it need?", down=1)
        asked.expect_exact("Penguin Study is ready.")

    copier.run_copy(
        str(template),
        tmp_path / "expected",
        data={
            "project_name": "Penguin Study",
            "package_name": "study",
            "licence": "Apache-2.0",
            "example": False,
            "tracking_backend": "server",
            "tracking_uri": "https://mlflow.example.org",
            "ci": "github",
            "extras": ["serving"],
        },
        defaults=True,
        quiet=True,
    )
    assert files(tmp_path / "project") == files(tmp_path / "expected")


def test_a_folder_keeps_the_files_that_it_had(
    template: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    theirs = {
        "notes.txt": b"Mine.\r\n",
        "src/other/code.py": b"x=1",
        # What belongs to the project's owner, by the template's own rules.
        "README.md": b"My words.\n",
        "conf/base/catalog.yml": b"mine: {type: MemoryDataset}\n",
    }
    write(tmp_path / "project", theirs)

    output = command_line(template, tmp_path, *ON_THE_COMMAND_LINE["--data"], quiet=False)

    # The instructions arrive all the same, and it is said where they are.
    instructions = {"INSTRUCTIONS.md": expected["README.md"]}
    assert without_answers(tmp_path / "project") == {**expected, **theirs, **instructions}
    assert "INSTRUCTIONS.md says how to work with the project" in output


def test_a_file_in_the_way_is_asked_about_in_a_terminal(
    template: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    theirs = {"pyproject.toml": b"[tool.mine]\n", ".gitignore": b"mine\n"}
    write(tmp_path / "project", theirs)

    with terminal(template, tmp_path, *ON_THE_COMMAND_LINE["--data"]) as asked:
        asked.confirm("Overwrite .gitignore?", "y")
        asked.confirm("Overwrite pyproject.toml?", "n")

    mine = {"pyproject.toml": theirs["pyproject.toml"]}
    assert without_answers(tmp_path / "project") == {**expected, **mine}


def test_a_file_in_the_way_stops_copier_where_nobody_can_be_asked(
    template: Path, tmp_path: Path
) -> None:
    theirs = {"pyproject.toml": b"[tool.mine]\n"}
    write(tmp_path / "project", theirs)

    refused = command_line(template, tmp_path, *ON_THE_COMMAND_LINE["--data"], status=1)

    assert refused.splitlines()[-1].endswith("Consider using `--overwrite`")
    assert (tmp_path / "project" / "pyproject.toml").read_bytes() == theirs["pyproject.toml"]


def test_a_copy_over_a_copy_changes_nothing(
    template: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    for _ in range(2):
        command_line(template, tmp_path, *ON_THE_COMMAND_LINE["--data"])

    assert without_answers(tmp_path / "project") == expected


def test_no_link_lies_in_the_template(template: Path) -> None:
    assert [path for path in (template / "template").rglob("*") if path.is_symlink()] == []
