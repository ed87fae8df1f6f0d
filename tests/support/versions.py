"""The template as a repository with versions: those of its history, and artificial ones."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import NamedTuple

from ..conftest import REPOSITORY
from ..template.conftest import git

# The template as it lies here, whatever its version will be called.
NOW = "v1000.0.0"
RUNTIME = "template/src/{{ package_name }}/runtime"

# What the artificial versions take away outside of the runtime, which is the template's: a line is
# left there, or the file stays as it is.
LEFT = {
    "conf/README.md": b"Is conf/FOLDERS.md now: bring changes there.\n",
}
KEPT = {"conf/prod/mlflow.yml"}


class Versions(NamedTuple):
    """A repository of the template, and its tags in their order."""

    repository: Path
    released: list[str]
    artificial: list[str]

    @property
    def all(self) -> list[str]:
        return [*self.released, NOW, *self.artificial]


def make_versions(template: Path, folder: Path) -> Versions:
    """Make the repository in a new folder; without history it has no released versions."""
    released = []
    if _has_history():
        git(folder.parent, "clone", "--quiet", REPOSITORY.as_posix(), folder.name)
        released = _tag_releases(folder)
        git(folder, "rm", "-r", "--quiet", ".")
    else:
        folder.mkdir()
        git(folder, "init", "--quiet")
    shutil.copytree(template, folder, dirs_exist_ok=True)
    tag(folder, NOW)
    artificial = []
    for number, change in enumerate(CHANGES, start=1001):
        change(folder)
        artificial.append(tag(folder, f"v{number}.0.0"))
    return Versions(folder, released, artificial)


def tag(repository: Path, version: str) -> str:
    """Commit everything as a version."""
    git(repository, "add", "--all")
    git(repository, "commit", "--quiet", f"--message={version}")
    git(repository, "tag", version)
    return version


def _has_history() -> bool:
    """Tell whether this is a checkout with all of its history; many of CI's are not."""
    if not (REPOSITORY / ".git").exists():
        return False
    return git(REPOSITORY, "rev-parse", "--is-shallow-repository").strip() == "false"


def _tag_releases(clone: Path) -> list[str]:
    """Tag each version of the changelog that has no tag; name them all in order."""
    tags = git(clone, "tag").split()
    changelog = git(clone, "show", "HEAD:CHANGELOG.md")
    versions = re.findall(r"^## (v\d+\.\d+\.\d+)$", changelog, re.MULTILINE)
    for version in versions:
        if version not in tags:
            git(clone, "tag", version, _commit_that_named(clone, version))
    return versions[::-1]


def _commit_that_named(clone: Path, version: str) -> str:
    """Return the latest commit that wrote a version's heading on top of the changelog.

    A heading may have been taken back and written again, below that of a later version too.
    """
    heading = f"## {version}\n"
    commits = git(clone, "log", "--format=%H", f"-S{heading}", "--", "CHANGELOG.md").split()
    for commit in commits:
        _, _, newest = git(clone, "show", f"{commit}:CHANGELOG.md").partition("\n## ")
        if f"## {newest}".startswith(heading):
            return commit
    raise AssertionError(f"No commit wrote {version} on top of CHANGELOG.md.")


def replace(path: Path, old: str, new: str) -> None:
    """Replace a text that has to be in a file."""
    text = path.read_text("utf-8")
    assert old in text, f"{path.name} has no {old!r}"
    path.write_bytes(text.replace(old, new).encode())


def append(path: Path, line: str) -> None:
    with path.open("a", encoding="utf-8", newline="\n") as file:
        file.write(f"{line}\n")


def exclude(template: Path, pattern: str) -> None:
    """Add a pattern to `_exclude`."""
    replace(template / "copier.yml", "  - .DS_Store\n", f'  - .DS_Store\n  - "{pattern}"\n')


def leave_a_line(template: Path, source: str, shipped: str) -> None:
    """Take a file away as copier.yml says: a line stays, which new projects don't get."""
    (template / source).unlink(missing_ok=True)
    target = template / source.removesuffix(".jinja")
    target.write_bytes(LEFT[shipped])
    pattern = shipped.replace("penguin_study", "*")
    exclude(template, f"{{% if _copier_operation == 'copy' %}}/{pattern}{{% endif %}}")


def add_a_runtime_file(template: Path) -> None:
    (template / RUNTIME / "added.py").write_bytes(b'"""Added."""\n\nADDED = 1\n')
    append(template / RUNTIME / "hooks.py", "\n# And more.")


def change_what_belongs_to_the_owner(template: Path) -> None:
    """Nothing of this may arrive in a project that is there."""
    for name in ("README.md", "conf/base/catalog.yml", "conf/base/parameters.yml"):
        append(template / "template" / f"{name}.jinja", "# Theirs.")
    pipelines = template / "template/src/{{ package_name }}/pipelines"
    append(pipelines / "__init__.py", "# Theirs.")
    (pipelines / "extra").mkdir()
    (pipelines / "extra/__init__.py").write_bytes(b'"""Theirs."""\n')
    append(template / "template/conf/local/credentials.yml", "# Theirs.")
    (template / "template/data/01_raw/extra.csv").write_bytes(b"theirs\n1\n")
    (template / "template/notebooks/extra.ipynb").write_bytes(b"{}\n")


def rename_a_runtime_file(template: Path) -> None:
    runtime = template / RUNTIME
    (runtime / "config/resolvers.py").rename(runtime / "config/naming.py")
    replace(runtime / "__init__.py", "config.resolvers", "config.naming")


def ask_a_new_question(template: Path) -> None:
    question = "\nteam:\n  type: str\n  help: Whose is it?\n  default: Everybody\n"
    append(template / "copier.yml", question)
    append(template / "template/conf/README.md.jinja", "\nAsk {{ team }}.")


def give_a_question_a_new_default(template: Path) -> None:
    """Whoever has answered it, or left it at the old default, keeps that."""
    replace(template / "copier.yml", "default: none\n\nexample", "default: MIT\n\nexample")


def move_a_file(template: Path) -> None:
    folder = template / "template/conf"
    shutil.copy(folder / "README.md.jinja", folder / "FOLDERS.md.jinja")
    leave_a_line(template, "template/conf/README.md.jinja", "conf/README.md")


def remove_a_runtime_file(template: Path) -> None:
    (template / RUNTIME / "added.py").unlink()


def give_a_file_to_the_owner(template: Path) -> None:
    (template / "template/conf/prod/mlflow.yml.jinja").unlink()
    exclude(template, "/conf/prod/mlflow.yml")


CHANGES = [
    add_a_runtime_file,
    change_what_belongs_to_the_owner,
    rename_a_runtime_file,
    ask_a_new_question,
    give_a_question_a_new_default,
    move_a_file,
    remove_a_runtime_file,
    give_a_file_to_the_owner,
]
