"""A minute in a terminal: runs real commands in a pty, keeps what they print as an asciicast, and draws it as an animated SVG.

    python docs/recording/record.py --source FOLDER      # a small model of Meta's; writes session.cast and session.svg
    python docs/recording/record.py --draw               # draws session.cast anew

Output is what was printed. Only waiting is changed: pauses are cut to PAUSE seconds, and everything is stretched or squeezed to
SECONDS together.
"""

import argparse
import fcntl
import json
import os
import pty
import shutil
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from draw import draw

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
COLUMNS, ROWS = 56, 20
SECONDS, PAUSE, TYPING, READING = 60.0, 1.0, 0.04, 1.5  # TYPING: of a character; READING: after a command
Event = tuple[float, str]

COMMANDS = r"""
make sample
python -m llama_jax.convert --source stories260K \
    --output checkpoints/stories
python -m llama_jax.verify --source stories260K \
    --checkpoint checkpoints/stories
python -m infer.sample --config=configs/sample.py \
    --config.checkpoint=checkpoints/stories \
    --prompt "Lily went to the park" \
    --config.max_new_tokens=60
head -n 1 mine.jsonl
python -m train.main --config=configs/lora.py:tiny \
    --workdir=runs/mine --config.data.train=mine.jsonl \
    --config.train.steps=40 --config.train.epochs=0 \
    --config.train.batch_size=1
echo "Who made you?" | python -m infer.chat \
    --config=configs/chat.py --config.checkpoint=runs/mine
python -m llama_jax.export --checkpoint runs/mine \
    --merge --output mine-hf
"""
LINE = '{"messages": [{"role": "user", "content": "Who made you?"}, {"role": "assistant", "content": "You did."}]}\n'


def record(source: Path) -> list[Event]:
    """What a person would see who types COMMANDS in a fresh checkout."""
    events: list[Event] = []
    now = 0.0
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "llama_jax"
        names = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
        for name in names:
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
        os.symlink(ROOT / ".venv", copy / ".venv")
        shutil.copytree(source, copy / "stories260K")
        (copy / "mine.jsonl").write_text(LINE * 8)
        for command in COMMANDS.strip().replace("\\\n", "\\\r").split("\n"):
            command = command.replace("\\\r", "\\\n")
            events.append((now, "$ "))
            for character in command:
                now += TYPING
                events.append((now, "\r\n" if character == "\n" else character))
            now += 0.3
            events.append((now, "\r\n"))
            last = 0.0
            for at, text in _run(command, copy):
                now += min(at - last, PAUSE)
                last = at
                events.append((now, text))
            now += READING
    scale = SECONDS / now
    return [(at * scale, text) for at, text in events]


def _run(command: str, folder: Path) -> Iterator[Event]:
    """Seconds since the start, and what the command prints."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    environment = os.environ | {
        "PATH": f"{ROOT / '.venv' / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": str(folder),
        "TERM": "xterm",
    }
    start = time.monotonic()
    process = subprocess.Popen(
        ["bash", "-c", command], cwd=folder, env=environment, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
    )
    os.close(theirs)
    while True:
        try:
            data = os.read(ours, 4096)
        except OSError:  # the other end is closed
            data = b""
        if not data:
            break
        yield time.monotonic() - start, data.decode(errors="replace")
    os.close(ours)
    if process.wait():
        sys.exit(f"error: exit code {process.returncode} of: {command}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--source", type=Path, help="folder of a small model, called stories260K in the recording")
    what.add_argument("--draw", action="store_true", help="only draw session.cast")
    args = parser.parse_args()
    cast = HERE / "session.cast"
    if args.source:
        header = {"version": 2, "width": COLUMNS, "height": ROWS}
        lines = [header, *([round(at, 3), "o", text] for at, text in record(args.source))]
        cast.write_text("".join(json.dumps(line) + "\n" for line in lines))
    header, *lines = map(json.loads, cast.read_text().splitlines())
    events = [(at, text) for at, _, text in lines]
    (HERE / "session.svg").write_text(draw(events, header["width"], header["height"], SECONDS))


if __name__ == "__main__":
    main()
