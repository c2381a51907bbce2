"""Readings of the machine, from made-up /proc and /sys trees."""

from pathlib import Path

from brigade.engine.machine import Cpu, Limits, read_cpu, read_limits


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_an_x86_cpu_is_read_from_cpuinfo(tmp_path: Path) -> None:
    text = "model name\t: Fast CPU\nflags\t\t: fpu avx2 avx512f\n\nmodel name\t: Other\nflags\t\t: fpu\n"
    assert read_cpu(tree(tmp_path, {"proc/cpuinfo": text})) == Cpu("Fast CPU", frozenset({"fpu", "avx2", "avx512f"}))


def test_an_arm_cpu_lists_its_features_under_another_name(tmp_path: Path) -> None:
    cpu = read_cpu(tree(tmp_path, {"proc/cpuinfo": "processor\t: 0\nFeatures\t: fp asimd bf16 i8mm\nModel\t: Board\n"}))
    assert cpu == Cpu("Board", frozenset({"fp", "asimd", "bf16", "i8mm"}))


def test_a_system_without_proc_still_has_a_cpu_with_a_name(tmp_path: Path) -> None:
    cpu = read_cpu(tmp_path)
    assert cpu.model
    assert cpu.features == frozenset()


def test_no_control_group_means_no_limit(tmp_path: Path) -> None:
    assert read_limits(tmp_path) == Limits(None, None, 0)


def test_the_tightest_of_nested_version_2_groups_counts(tmp_path: Path) -> None:
    root = tree(
        tmp_path,
        {
            "proc/self/cgroup": "0::/a/b\n",
            "sys/fs/cgroup/a/cpu.max": "150000 100000\n",
            "sys/fs/cgroup/a/memory.max": "1000\n",
            "sys/fs/cgroup/a/memory.current": "700\n",
            "sys/fs/cgroup/a/memory.stat": "anon 1\ninactive_file 200\n",
            "sys/fs/cgroup/a/b/cpu.max": "max 100000\n",
            "sys/fs/cgroup/a/b/memory.max": "max\n",
        },
    )
    assert read_limits(root) == Limits(cores=1.5, memory=1000, memory_used=500)


def test_version_1_groups_are_read_and_its_huge_number_means_no_limit(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "5:cpu,cpuacct:/box\n4:memory:/only/on/the/host\n0::/\n",
        "sys/fs/cgroup/cpu/box/cpu.cfs_quota_us": "50000\n",
        "sys/fs/cgroup/cpu/box/cpu.cfs_period_us": "100000\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
    }
    assert read_limits(tree(tmp_path, files)) == Limits(cores=0.5)
    files["sys/fs/cgroup/memory/memory.limit_in_bytes"] = "4096\n"
    files["sys/fs/cgroup/cpu/box/cpu.cfs_quota_us"] = "-1\n"
    assert read_limits(tree(tmp_path, files)) == Limits(memory=4096)
