"""Profiles: those that come along, values over them, and every kind of fault."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from cosmos_ssl.errors import ConfigError, UserError
from cosmos_ssl_launch.profile import LocalProfile, SlurmProfile, packaged_profiles, read_profile


@pytest.mark.parametrize("name", packaged_profiles())
def test_packaged_profiles_are_sound(name: str) -> None:
    assert read_profile(name).kind == name.partition("_")[0]


def test_ranks_of_the_examples() -> None:
    assert {name: read_profile(name).ranks for name in packaged_profiles()} == {
        "local": 1,
        "slurm": 1,
        "slurm_32x4": 128,
        "slurm_4x4": 16,
    }


def test_commented_lines_of_the_examples_are_sound(tmp_path: Path) -> None:
    for path in (path for name, path in packaged_profiles().items() if "x" in name):
        text = re.sub(r"^# ( +- | +[A-Za-z_-]+: |[a-z_]+:)", r"\1", path.read_text(), flags=re.MULTILINE)
        (tmp_path / path.name).write_text(text)
        profile = read_profile(str(tmp_path / path.name))
        assert (
            isinstance(profile, SlurmProfile) and profile.account == "my_project" and profile.slurm["exclusive"] is True
        )


def test_values_of_the_command_line_win() -> None:
    values = [
        "partition=gpu",
        "nodes=2",
        "environment.NCCL_DEBUG=INFO",
        "slurm.mail-type=END",
        "mem=64G",
        "gpus_per_node=",
    ]
    profile = read_profile("slurm", values)
    assert isinstance(profile, SlurmProfile)
    assert (profile.partition, profile.nodes, profile.mem, profile.gpus_per_node) == ("gpu", 2, "64G", None)
    assert (profile.environment, profile.slurm) == ({"NCCL_DEBUG": "INFO"}, {"mail-type": "END"})
    assert read_profile("local", ["nproc=3"]) == LocalProfile(kind="local", nproc=3)


@pytest.mark.parametrize(
    ("written", "minutes"),
    [
        ("90", 90),
        ("12:00:00", 720),
        ("00:10:30", 11),
        ("30:00", 30),
        ("2-00:00:00", 2880),
        ("1-12", 2160),
        ("0-01:30", 90),
    ],
)
def test_times_as_slurm_writes_them(written: str, minutes: int) -> None:
    profile = read_profile("slurm", [f"time={written}"])
    assert isinstance(profile, SlurmProfile) and profile.time == minutes


FAULTS = """\
kind: slurm
nodes: two
partion: gpu
time: soon
setup: module load cuda
environment: {A-B: 1}
srun_args: ["--mpi=none", 3]
slurm: {exclusive: [1]}
"""


def test_all_faults_at_once_and_where(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(FAULTS)
    with pytest.raises(ConfigError) as caught:
        read_profile(str(path), ["gpus_per_node=-1"])
    found = str(caught.value).replace(f"{path}:", "")
    for message in (
        "2  nodes: expected an integer, got 'two'",
        "3  partion: unknown key. Did you mean 'partition'? Accepts: kind, nodes, tasks_per_node, ",
        "4  time: expected minutes or a time such as 12:00:00 or 2-00:00:00, got 'soon'",
        "5  setup: expected a list, got 'module load cuda'",
        "6  environment.A-B: no name for a variable",
        "7  srun_args.1: expected a string, got 3",
        "8  slurm.exclusive: expected a string or an integer or a boolean, got [1]",
        "command line  profile.gpus_per_node: expected greater than or equal to 0, got -1",
    ):
        assert message in found, found
    assert len(caught.value.faults) == 8


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nodes: 2", "kind: expected local or slurm"),
        ("kind: cloud", "kind: expected local or slurm, got 'cloud'"),
        ("kind: local\nnodes: 2", "nodes: unknown key. Accepts: kind, nproc"),
        ("kind: local\nkind: slurm", "kind: given twice"),
    ],
)
def test_kinds(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_profile(str(path))
    assert message in str(caught.value)


def test_a_profile_that_is_not_there() -> None:
    with pytest.raises(
        UserError, match=r"no profile 'slrm': there is no such file. Did you mean 'slurm'\? Those that come with"
    ):
        read_profile("slrm")


@pytest.mark.parametrize(
    "key",
    [
        *("partition", "account", "qos", "constraint", "mem", "python", "setup", "srun_args"),
        "environment.A",
        "slurm.mail-user",
    ],
)
@pytest.mark.parametrize("evil", ["gpu\n#SBATCH --wrap=evil", "gpu\r", "a\x1b[2J"])
def test_no_value_writes_more_than_its_line(tmp_path: Path, key: str, evil: str) -> None:
    outer, _, inner = key.partition(".")
    value = json.dumps(evil)
    path = tmp_path / "mine.yaml"
    path.write_text(
        f"kind: slurm\n{outer}: "
        f"{f'{{{inner}: {value}}}' if inner else f'[{value}]' if key in ('setup', 'srun_args') else value}\n"
    )
    with pytest.raises(ConfigError) as caught:
        read_profile(str(path))
    said = str(caught.value)
    assert f"mine.yaml:2  {key}" in said and "one line without control characters" in said and said.isprintable()
