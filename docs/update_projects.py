"""Update many projects from their templates: `python update_projects.py [--json] FOLDER…`.

What Copier can merge is committed on a new branch, `template-<version>`, which all projects of a
repository share. What needs a person is left on that branch, not committed; a project that can't
be updated is left as it was. The exit status is 1 when any project needs a person. It takes Copier
9.19.1 or later, git, and nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

ANSWERS = ".copier-answers.yml"
ENV = os.environ | {
    # Nobody sits here who could be asked for a password.
    "GIT_TERMINAL_PROMPT": "0",
    # With another value `git apply`, and so Copier, would leave out edits without a word.
    "GIT_CONFIG_COUNT": "1",
    "GIT_CONFIG_KEY_0": "apply.whitespace",
    "GIT_CONFIG_VALUE_0": "nowarn",
}


@dataclass(frozen=True)
class Outcome:
    """What became of a project."""

    project: str
    status: str  # updated, nothing new, waiting, clash or refused
    version: str
    what: str = ""


class CommandError(Exception):
    """A command that has failed, with the last line that it wrote."""


def run(project: Path, *command: str) -> str:
    """Run a command in a project and return what it writes to stdout."""
    done = subprocess.run(
        command,
        cwd=project,
        env=ENV,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    if done.returncode:
        lines = (done.stderr.strip() or done.stdout.strip() or "nothing said").splitlines()
        raise CommandError(f"{command[0]}: {lines[-1]}")
    return done.stdout


def update(project: Path, copier: list[str]) -> Outcome:
    """Update one project, on a branch of its own."""
    version = ""
    try:
        if not (project / ANSWERS).is_file():
            raise CommandError(f"there is no {ANSWERS}: Copier has not made it")
        if run(project, "git", "status", "--porcelain"):
            raise CommandError("there are changes that are not committed")
        found = json.loads(run(project, *copier, "check-update", "--output-format=json"))
        if not found["update_available"]:
            return Outcome(project.name, "nothing new", found["current_version"])
        version = found["latest_version"]
        branch = f"template-{version}"
        base = run(project, "git", "branch", "--show-current").strip()
        # Else a project before this one, in the same repository, has made it just now.
        if base != branch:
            if exists(project, branch):
                what = f"{branch} is there already: merge it, then delete it"
                return Outcome(project.name, "waiting", version, what)
            run(project, "git", "switch", "--quiet", f"--create={branch}")
        try:
            run(project, *copier, "update", "--defaults", "--quiet")
            if changed := changed_answers(project):
                raise CommandError(f"answers would change: {', '.join(changed)}")
        except CommandError:
            undo(project)
            if base != branch:
                run(project, "git", "switch", "--quiet", "-")
                run(project, "git", "branch", "--quiet", "--delete", "--force", branch)
            raise
    except CommandError as error:
        return Outcome(project.name, "refused", version, str(error))
    try:
        if what := clashes(project, copier):
            return Outcome(project.name, "clash", version, what)
        run(project, "git", "add", "--all")
        message = f"Update {project.name} to {version} of the template"
        run(project, "git", "commit", "--quiet", f"--message={message}")
    except CommandError as error:  # of a hook, for instance
        return Outcome(project.name, "clash", version, f"not committed: {error}")
    return Outcome(project.name, "updated", version, branch)


def exists(project: Path, branch: str) -> bool:
    """Check whether a branch is there, or on a remote as far as git knows."""
    patterns = [f"refs/heads/{branch}", f"refs/remotes/*/{branch}"]
    return bool(run(project, "git", "for-each-ref", *patterns))


def changed_answers(project: Path) -> list[str]:
    """Name the answers of the last commit that the update changes or drops."""
    before = read_answers(run(project, "git", "show", f"HEAD:./{ANSWERS}"))
    after = read_answers((project / ANSWERS).read_text("utf-8"))
    return [name for name, answer in before.items() if after.get(name) != answer]


def read_answers(text: str) -> dict[str, str]:
    """Split the answers file at its keys; quotes and line ends of an answer don't count."""
    entries = re.findall(r"^([a-z]\w*):(.*?)(?=^\S+:|\Z)", text, re.DOTALL | re.MULTILINE)
    return {name: " ".join(answer.split()).strip("'\"") for name, answer in entries}


def undo(project: Path) -> None:
    """Undo an update that was broken off; there was nothing that wasn't committed."""
    run(project, "git", "reset", "--quiet", "--hard")
    run(project, "git", "clean", "--quiet", "--force", "-d")


def clashes(project: Path, copier: list[str]) -> str:
    """Say in which files a person has to decide; the empty text when there are none."""
    found = {
        "both changed": names(project, "diff", "--relative", "--diff-filter=U"),
        "rejected": names(project, "ls-files", "--others", "--exclude-standard", "*.rej"),
        "deleted with edits": deleted_with_edits(project, copier),
    }
    return "; ".join(f"{kind}: {', '.join(files)}" for kind, files in found.items() if files)


def names(project: Path, command: str, *words: str) -> list[str]:
    """Name the files that a command of git finds."""
    options = ["-z", "--name-only"] if command == "diff" else ["-z"]
    found = run(project, "git", command, *options, *words)
    return sorted(set(filter(None, found.split("\0"))))


def deleted_with_edits(project: Path, copier: list[str]) -> list[str]:
    """Name the files that the update deletes and that are not as they were generated."""
    deleted = names(project, "diff", "--relative", "--no-renames", "--diff-filter=D")
    if not deleted:
        return []
    with tempfile.TemporaryDirectory() as folder:
        generated = Path(folder, project.name)
        generated.mkdir()
        answers = run(project, "git", "show", f"HEAD:./{ANSWERS}")
        (generated / ANSWERS).write_text(answers, "utf-8")
        recopy = ["recopy", "--vcs-ref=:current:", "--defaults", "--overwrite", "--quiet"]
        run(generated, *copier, *recopy)
        return [name for name in deleted if not is_same(project, generated, name)]


def is_same(project: Path, generated: Path, name: str) -> bool:
    """Compare a file of the last commit with the one that was generated."""
    if not (generated / name).is_file():
        return False
    before = run(project, "git", "rev-parse", f"HEAD:./{name}")
    return before == run(project, "git", "hash-object", str(generated / name))


def main() -> int:
    """Update the projects that are named, and say what became of each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("projects", nargs="+", type=Path, metavar="FOLDER")
    parser.add_argument("--copier", default="copier", help='how to call it: "uvx copier"')
    parser.add_argument("--json", action="store_true", help="write a list instead of a table")
    options = parser.parse_args()
    outcomes = [update(project.resolve(), options.copier.split()) for project in options.projects]
    if options.json:
        print(json.dumps([asdict(outcome) for outcome in outcomes]))
    else:
        rows = [tuple(asdict(outcome).values()) for outcome in outcomes]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            print("  ".join(cells).rstrip())
    return int(any(outcome.status in ("clash", "refused") for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
