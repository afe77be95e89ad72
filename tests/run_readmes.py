"""Run the commands of the READMEs in a copy of the project, and see that none of them changes a file of it.

    python tests/run_readmes.py --quick    # those that take less than a minute on two cores
    python tests/run_readmes.py            # without training, measuring and benchmarks
    python tests/run_readmes.py --all      # all that need no more than the project ships, for hours

Commands are the lines of ```bash blocks and the code of a paragraph that begins with `python` or `--mode`. Left out are
installations, examples with an ellipsis, and what needs files that the project does not ship (a checkpoint of the hub,
photos, annotations), each with its reason; the published decoder is used if it was made (`build/qwen2.5-0.5b`).
Exits with 1 if a command fails or `git status` is not clean after it.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
READMES = ("README.md", "studies/README.md", "demo_model/README.md", "cam_results/benchmark/README.md")
DECODERS = ("build/qwen2.5-0.5b", "build/coder-1.5b")
LEFT_OUT = {  # what stands in the command: why it is not run
    r"^pip |&& pip |python -m pytest": "installs",
    r"…|--answers$": "an example",
    r"studies/app\.py": "a server",
    r"Qwen/": "fetches a published model",
    r"photo\.jpg|photos/|a\.jpg|annotations/|coco\.jsonl| (questions|list)\.jsonl|clip\.mp4": "needs files of yours",
    r"studies/questions\.py": "needs published files",
    r"--device cuda|--shape 7B": "needs a GPU",
}
LONG = r"tests/|demo_model/(train|evaluate|graft)\.py|torchrun"
SLOW = r"--mode evaluate|--answers|--model_path build/"  # more than a minute on two cores


def commands_of(text: str) -> list[str]:
    """The commands of a README, in their order."""
    found = re.findall(r"```bash\n(.*?)```|(?<![`\w])`((?:python|--mode) [^`\n]+)`", text, re.DOTALL)
    lines = [line for block, inline in found for line in (block or inline).splitlines()]
    bare = [re.sub(r"\s+#.*$", "", line).strip() for line in lines]
    return [f"python test_gradcam.py {line}" if line.startswith("--") else line for line in bare if line]


def all_commands() -> list[str]:
    """Those of all READMEs, each once."""
    found = [command for readme in READMES for command in commands_of((ROOT / readme).read_text(encoding="utf-8"))]
    return list(dict.fromkeys(found))


def left_out(command: str, everything: bool, quick: bool = False) -> str:
    """Why a command is not run, or nothing."""
    why = [reason for mark, reason in LEFT_OUT.items() if re.search(mark, command)]
    missing = [folder for folder in DECODERS if folder in command and not (ROOT / folder).is_dir()]
    why += [f"needs {folder}" for folder in missing]
    why += ["takes long (--all)"] if re.search(LONG, command) and not everything else []
    why += ["takes more than a minute (without --quick)"] if re.search(SLOW, command) and quick else []
    return why[0] if why else ""


def copy_project(folder: Path) -> None:
    """What git would take of the project as it is now, in a repository of its own."""
    git = ["git", "--git-dir", str(folder / ".git")]
    subprocess.run(["git", "init", "-q", folder], check=True)
    subprocess.run([*git, "--work-tree", ROOT, "add", "-A"], check=True)
    named = ["-c", "user.name=run", "-c", "user.email=run@localhost"]
    subprocess.run([*git, *named, "commit", "-q", "-m", "as it is"], check=True)
    subprocess.run([*git, "--work-tree", folder, "checkout", "-q", "-f", "HEAD"], check=True)
    (folder / "build").mkdir()
    for decoder in DECODERS:
        if (ROOT / decoder).is_dir():
            (folder / decoder).symlink_to((ROOT / decoder).resolve())


def changed(folder: Path) -> str:
    """What `git status` says of the copy."""
    return subprocess.run(["git", "status", "--short"], cwd=folder, capture_output=True, text=True, check=True).stdout


def run(command: str, folder: Path) -> tuple[int, str]:
    """The exit code of a command in the copy, with this interpreter as `python`, and what it printed."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        command, shell=True, cwd=folder, env={**os.environ, "PATH": path}, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
    )  # fmt: skip
    return done.returncode, done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description="Run the commands of the READMEs; none may change a file of git.")
    parser.add_argument("--all", action="store_true", help="also those that take long")
    parser.add_argument("--quick", action="store_true", help="only those that take less than a minute on two cores")
    parser.add_argument("--list", action="store_true", help="only say what would be run, and what not")
    options = parser.parse_args()
    failed, commands = [], all_commands()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "project"
        copy_project(folder)
        for command in commands:
            if why := left_out(command, options.all, options.quick):
                print(f"not run, {why}: {command}", flush=True)
                continue
            if options.list:
                print(f"to run: {command}")
                continue
            start = time.monotonic()
            code, printed = run(command, folder)
            dirty = changed(folder)
            print(f"{time.monotonic() - start:.0f} s, exit code {code}: {command}", flush=True)
            if code or dirty:
                failed.append(command)
                print(f"{printed[-2000:]}\ngit status:\n{dirty}", flush=True)
                subprocess.run("git checkout -q . && git clean -q -f", shell=True, cwd=folder, check=True)
    if failed:
        sys.exit(f"{len(failed)} of {len(commands)} failed or changed files:\n" + "\n".join(failed))


if __name__ == "__main__":
    main()
