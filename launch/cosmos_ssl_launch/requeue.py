"""When a run on a cluster starts again by itself: the rule, the file it reads, and the lines of the batch script.

SLURM requeues a job that it preempts or whose node fails. It does not requeue one that failed, so the batch script
does where starting again may help: a rank, a node or storage was lost (exit code 74), or a process died by a signal.
Such restarts, and those after a time-out, end when several in a row have brought no new checkpoint.

A chain is several jobs of one run, none of which is requeued: each waits for the end of the one before, whatever that
is (``afterany``; ``singleton`` would go by the job's name, which two runs may share). One that has brought the run to
its end, or has failed where going on makes no sense, leaves a note, by which the following ones end at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cosmos_ssl.errors import EXIT_LOST, EXIT_SAVED
from cosmos_ssl.files import checkpoint_folders

STARTS = "slurm/starts"
"""In the run folder: the newest checkpoint at each start, a line a start."""

ENDED = "slurm/ended"
"""In the run folder: exit code and message of the rank that ended a job by itself, before srun killed the others."""

OVER = "slurm/over"
"""In the run folder: with which exit code and why the jobs of a chain that are left end at once."""

NONE = "none"


def newest_checkpoint(run: Path) -> str:
    """The name of the newest checkpoint of a run folder, or ``none``."""
    return next((path.name for path in reversed(checkpoint_folders(run))), NONE)


def note_start(run: Path) -> list[str]:
    """Add a line for this start; all of them."""
    path = run / STARTS
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(f"{newest_checkpoint(run)}\n")
    return starts(run)


def starts(run: Path) -> list[str]:
    """The newest checkpoint at each start."""
    path = run / STARTS
    return path.read_text(encoding="utf-8", errors="replace").split() if path.exists() else []


def may_restart(noted: Sequence[str], newest: str, limit: int) -> bool:
    """Return whether a run that now has ``newest`` may start again, after at most ``limit`` restarts without a new
    checkpoint.
    """
    return noted[-(limit + 1) :].count(newest) <= limit


def note_end(run: Path, code: int, message: str) -> None:
    """Say why this rank ends, unless another has said so before."""
    try:
        with (run / ENDED).open("x", encoding="utf-8") as file:
            file.write(f"{code} {message}\n")
    except OSError:  # another was first, or the storage is what was lost
        return


def before_srun(runs: Sequence[Path]) -> list[str]:
    """Lines of the batch script that give ``run`` its run folder and forget the end of an earlier start."""
    folders = " ".join(_quoted(str(run.absolute())) for run in runs)
    return [
        f"runs=({folders})",
        "run=${runs[${SLURM_ARRAY_TASK_ID:-0}]}",
        "export PYTHONSAFEPATH=1  # else the folder that the job starts in comes before PYTHONPATH",
        f'rm -f "$run/{ENDED}"',
    ]


def after_srun(limit: int) -> list[str]:
    """Lines of the batch script that decide, by srun's exit code and ``starts``, whether to start again."""
    return [
        "code=$?",
        *_own_code("code _"),
        "id=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}",
        "id=${id:-$SLURM_JOB_ID}",
        f'if [ "$code" -eq {EXIT_LOST} ] || {_BY_SIGNAL}; then',
        f"  if {_no_progress(limit)}; then",
        f'    echo "exit code $code; {limit} restarts have brought no new checkpoint, so job $id ends here"',
        '  elif [ "$(squeue -h -j "$id" -o %T)" = RUNNING ]; then  # neither cancelled nor already requeued',
        '    echo "exit code $code: job $id is requeued"',
        '    scontrol requeue "$id" && sleep 60',
        "  fi",
        "fi",
        'exit "$code"',
    ]


def before_link(limit: int) -> list[str]:
    """Lines of a chain's batch script, after ``before_srun``, that end a job to which nothing is left to do."""
    told = f"{limit} restarts have brought no new checkpoint"
    return [
        f'if [ ! -s "$run/{OVER}" ] && {{ {_no_progress(limit)}; }}; then',
        f'  echo "{EXIT_LOST} {told}" > "$run/{OVER}"',
        "fi",
        f'if [ -s "$run/{OVER}" ]; then',
        f'  read -r code why < "$run/{OVER}"',
        '  echo "job $SLURM_JOB_ID of the chain ends at once: $why"',
        '  exit "$code"',
        "fi",
    ]


def after_link() -> list[str]:
    """Lines of a chain's batch script that leave a note for the following jobs where none of them is to go on."""
    return [
        "code=$?; why=",
        *_own_code("code why"),
        f'if [ "$code" -eq {EXIT_LOST} ] || [ "$code" -eq {EXIT_SAVED} ] || {_BY_SIGNAL}; then',
        '  echo "exit code $code: the next job of the chain goes on"',
        "else",
        '  if [ "$code" -eq 0 ]; then why="the run is finished"',
        '  else why="job $SLURM_JOB_ID ended with exit code $code${why:+: $why}"; fi',
        f'  printf "%s %s\\n" "$code" "$why" > "$run/{OVER}.tmp" && mv "$run/{OVER}.tmp" "$run/{OVER}"',
        "fi",
        'exit "$code"',
    ]


_BY_SIGNAL = '{ [ "$code" -gt 128 ] && [ "$code" -le 192 ]; }'


def _own_code(names: str) -> list[str]:
    return [
        "# srun tells of the signal by which it ended the other ranks; the one that left by itself has noted its "
        "own code",
        f'[ -s "$run/{ENDED}" ] && read -r {names} < "$run/{ENDED}"',
        "# by NCCL's flight recorder since this start; read by torch.distributed.flight_recorder",
        '[ "$code" -eq 0 ] || find "$run" -maxdepth 1 -name "nccl_rank*" -newer "$run/'
        f'{STARTS}" -printf "the last collectives of a rank are in %p\\n" 2> /dev/null',
    ]


def _no_progress(limit: int) -> str:
    """The rule of ``may_restart`` as a condition of the shell."""
    newest = '$(ls "$run/checkpoints" 2> /dev/null | grep -xE "step_[0-9]{8,}" | sort -V | tail -n 1)'
    starts = f'$(tail -n {limit + 1} "$run/{STARTS}" 2> /dev/null | grep -cFx -- "${{newest:-{NONE}}}")'
    return f'newest={newest}; [ "{starts}" -gt {limit} ]'


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"
