"""Whatever is done to `python -m lplb` ends in a sentence on stderr and an exit code, never in a traceback and never in waiting."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time

import numpy as np
import pytest

from lplb.cli import common, files, report, selfcheck
from lplb.cli.main import main
from lplb.cli.terminal import UsageError, guarded, harmless, shown
from lplb.cli.bench import plot as bench_plot
from lplb.cli.simulate import engine

LPLB = [sys.executable, "-m", "lplb"]


def command(*words, module="lplb", stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=None, preexec_fn=None, timeout=120, **environment):
    return subprocess.run([sys.executable, "-m", module, *map(str, words)], env={**os.environ, **environment}, stdin=subprocess.DEVNULL,
                          stdout=stdout, stderr=stderr, cwd=cwd, preexec_fn=preexec_fn, timeout=timeout)


def one_sentence(done, says, code):
    words = done.stderr.decode("utf-8", "replace")  # in the encoding of the terminal
    assert done.returncode == code, (done.returncode, words)
    assert words.startswith("lplb: ") and words.count("\n") == 1 and words.endswith("\n") and words[:-1].isprintable(), words
    assert says in words and "unexpected" not in words


@pytest.fixture
def small(tmp_path):
    """A trace that is played at once."""
    path = tmp_path / "small.npz"
    np.savez(path, topk_ids=np.random.default_rng(1).integers(0, 16, (40, 1, 2)).astype(np.int16), n_experts=16)
    return path


MIB = 1 << 20
SMALL = ("--tokens-per-rank", "2")


# ---- stdout and stderr ----

@pytest.mark.parametrize("words", [["simulate", *SMALL, "SMALL"], ["simulate", "--help"], ["--library"], ["--json"]])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_disk_on_stdout(small, words, unbuffered):
    with open("/dev/full", "wb") as full:
        done = command(*(small if word == "SMALL" else word for word in words), stdout=full, PYTHONUNBUFFERED=unbuffered)
    one_sentence(done, "cannot write to stdout: No space left on device", 1)


@pytest.mark.parametrize("words", [[], ["--library"], ["simulate", *SMALL, "SMALL"], ["simulate", "--help"]])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_went_away_is_no_error(small, words, unbuffered):
    process = subprocess.Popen([*LPLB, *(str(small) if word == "SMALL" else word for word in words)], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, env={**os.environ, "PYTHONUNBUFFERED": unbuffered})
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait(120) == 141


def test_head():
    done = subprocess.run(["bash", "-c", f'"{sys.executable}" -m lplb | head -n 1; echo "${{PIPESTATUS[0]}}"'],
                          capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith("ok    python") and done.stdout.endswith("\n141\n") and done.stderr == ""


def test_closed_streams(small):
    one_sentence(command("simulate", small, *SMALL, preexec_fn=lambda: os.close(1)), "stdout is closed", 1)
    one_sentence(command("--json", preexec_fn=lambda: os.close(1)), "stdout is closed", 1)
    done = command("simulate", small, *SMALL, preexec_fn=lambda: os.close(2))
    assert done.returncode == 0 and b"proven optimal" in done.stdout
    done = command("simulate", "gone.npz", preexec_fn=lambda: os.close(2))
    assert done.returncode == 2 and done.stdout == b""  # not on stdout instead


def test_a_full_disk_on_stderr():
    with open("/dev/full", "wb") as full:
        assert command("simulate", "gone.npz", stderr=full).returncode == 2


@pytest.mark.parametrize("environment", [
    {"PYTHONIOENCODING": "ascii"}, {"PYTHONIOENCODING": "ascii:strict"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    {"PYTHONIOENCODING": "latin-1:strict"}, {"PYTHONIOENCODING": "utf-8:strict"}, {"LANG": "C"},
])
def test_text_that_the_terminal_cannot_encode(tmp_path, environment):
    path = os.fsencode(tmp_path) + "/\u4e2d\u6587-".encode() + b"\xff.npz"  # a name that is no UTF-8
    with open(path, "wb") as stream:
        np.savez(stream, topk_ids=np.random.default_rng(1).integers(0, 16, (40, 1, 2)), n_experts=16, source="\u00fcber \u4e2d \U0001f600")
    done = command("simulate", os.fsdecode(path), *SMALL, **environment)
    assert done.returncode == 0 and done.stderr == b"" and b"source: " in done.stdout and b"proven optimal" in done.stdout
    with open(path, "wb") as stream:
        np.savez(stream, topk_ids=np.zeros(3))
    one_sentence(command("simulate", os.fsdecode(path), **environment), "topk_ids must be integers", 2)
    one_sentence(command("simulate", "--\u00fcber\udcff", **environment), "unrecognized", 2)


def test_paths_for_programs_come_as_the_bytes_they_are(tmp_path):
    path = os.fsencode(tmp_path) + b"/\xff\xc3\xbc.so"
    with open(path, "wb"):
        done = command("--library", LPLB_LIBRARY=os.fsdecode(path), PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stdout, done.stderr) == (0, path + b"\n", b"")


EVIL = "\x1b]0;owned\x07\x1b[31mred\x1b[0m\r\x08\x9b2J\u202eltr\u2028\nlplb: all is well\x00"


def test_escape_sequences_are_printed_harmless(tmp_path):
    name = f"{EVIL[:-1]}.npz".replace("/", "")
    np.savez(tmp_path / "a.npz", topk_ids=np.random.default_rng(1).integers(0, 16, (40, 1, 2)), n_experts=16, source=EVIL)
    os.rename(tmp_path / "a.npz", tmp_path / name)
    done = command("simulate", name, *SMALL, "--json", "out.json", "--plot", "out.png", "--history", name, cwd=tmp_path, PYTHONUTF8="1")
    assert done.returncode == 0, done.stderr
    text = done.stdout.decode("utf-8")
    assert all(line.isprintable() for line in text.split("\n")) and "\nlplb: all is well" not in text
    assert "\\x1b[31mred" in text and "source: \\x1b]0;owned\\x07" in text
    assert json.loads((tmp_path / "out.json").read_text())["config"]["source"] == EVIL.rstrip("\0")  # JSON escapes by itself
    (tmp_path / name).write_bytes(b"damaged")
    one_sentence(command("simulate", name, cwd=tmp_path), "\\x1b[31mred", 2)
    one_sentence(command("simulate", "--topology", EVIL[:-1], cwd=tmp_path), "\\x1b[31mred", 2)
    one_sentence(command("dance\x1b[2J", cwd=tmp_path), "\\x1b[2J", 2)
    done = command(LPLB_LIBRARY=f"{tmp_path}/{EVIL[:-1]}")
    assert done.returncode == 1 and b"\x1b" not in done.stdout and b"OFF   library" in done.stdout


def test_harmless_and_shown():
    assert harmless("plain \u00fc \u4e2d") == "plain \u00fc \u4e2d" and harmless(EVIL).isprintable() and harmless("a\nb") == "a\\nb"
    assert harmless("\udcff") == "\\udcff"
    assert shown("x" * 60) == "x" * 60 and shown("9" * 5000).endswith("... (5,000 characters)".replace("... ", f"...{'9' * 15} "))


# ---- Ctrl-C ----

@pytest.mark.parametrize("delay", [0, 0.05, 0.4, 1.2])
def test_ctrl_c_in_the_report(delay):
    """While the library and torch are loaded, and in a check that takes long."""
    program = """if True:
        import runpy, sys, time
        from lplb.cli import selfcheck
        selfcheck.CHECKS = (("slow", lambda: time.sleep(60)),)
        sys.argv = ["lplb"]
        runpy.run_module("lplb", run_name="__main__")"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline().startswith(b"ok    python")
    time.sleep(delay)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=50)[1]
    assert (process.returncode, said) == (130, b"lplb: interrupted\n")


def test_ctrl_c_in_a_simulation_leaves_no_file(tmp_path):
    pytest.importorskip("tqdm")  # its bar says when the work has begun
    ids = np.random.default_rng(1).integers(0, 64, (200_000, 2, 6)).astype(np.int8)
    np.savez(tmp_path / "long.npz", topk_ids=ids, n_experts=64)
    controller, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    process = subprocess.Popen([*LPLB, "simulate", str(tmp_path / "long.npz"), *SMALL, "--json", str(tmp_path / "out.json")],
                               stdout=subprocess.DEVNULL, stderr=terminal, preexec_fn=os.setsid)
    os.close(terminal)
    said = b""
    while b"simulate" not in said:
        assert select.select([controller], [], [], 60)[0] and process.poll() is None, said
        said += os.read(controller, 1000)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    while select.select([controller], [], [], 1)[0]:
        try:
            said += os.read(controller, 1000)
        except OSError:  # the terminal's other end is closed
            break
    assert b"Traceback" not in said and said.endswith(b"lplb: interrupted\r\n")
    assert os.listdir(tmp_path) == ["long.npz"]


# ---- arguments ----

DIGITS = "9" * 5000


@pytest.mark.parametrize("words", [
    ["--ranks", DIGITS], ["--ranks", DIGITS[:4000]], ["--slots", DIGITS], ["--slots", "9" * 12, "--placement", "eplb"], ["--nodes", DIGITS],
    ["--tokens-per-rank", DIGITS], ["--tokens-per-rank", "9" * 12], ["--seed", DIGITS], ["--seed", DIGITS[:4000]], ["--seed", f"-{DIGITS}"],
    ["--layers", DIGITS], ["--layers", f"0-{DIGITS}"], ["--layers", "0," * 5000 + "x"], ["--layers", "\u0663"], ["--experts", DIGITS],
    ["--history", DIGITS], ["--history", f"0.{DIGITS}e9"], ["--topology", f"torus:{DIGITS}x{DIGITS}"], ["--topology", f"torus:2x{DIGITS}"],
    ["--topology", DIGITS], ["--topology", ""], ["--unpack-limit", DIGITS], ["--unpack-limit", "0"], ["--placement", DIGITS], [DIGITS],
    [""], [f"--{DIGITS}"], ["--ranks", "1e3"], ["--ranks", "8\x00"], ["--json", "out\x00.json"], ["--plot", "out\x00.png"], ["a\x00.npz"],
    ["--json", ""], ["--json", "x" * 300], ["--plot", f"{'x' * 300}.png"], ["--plot", ""], ["--topology", "a\x00.npy"],
    ["--history", "a\x00.npz"], ["--seed", str(2**63)], ["--placement", "eplb", "--slots", "8200"],
])
def test_arguments_that_cannot_be_used(words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["simulate", *words]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("lplb: ") and said.err.count("\n") == 1 and len(said.err) < 1100
    assert said.err[:-1].isprintable() and os.listdir() == []


def test_draws_that_would_not_fit(tmp_path, capsys):
    (tmp_path / "a.json").write_text(json.dumps({"logical_count": [[1] * 16]}))
    for tokens in (2**25, 10**12):
        assert main(["simulate", str(tmp_path / "a.json"), "--tokens-per-rank", str(tokens)]) == 2
        assert "below 2^31" in capsys.readouterr().err


def test_counts_whose_sums_pass_any_limit_of_a_plan(tmp_path, capsys):
    np.save(tmp_path / "a.npy", np.full((30_000, 1, 16), 2**31 // 16 - 1))  # 2^41 tokens of each expert in the history
    code = main(["simulate", str(tmp_path / "a.npy"), "--history", "0.9998"])
    said = capsys.readouterr()
    assert code == 0 and "proven optimal" in said.out, said.err


def test_simulations_that_would_take_all_memory(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(engine, "MAX_SHARES", 8 * 16 * 2)
    ids = np.random.default_rng(1).integers(0, 16, (40, 1, 2))
    np.savez(tmp_path / "a.npz", topk_ids=ids, n_experts=16)
    assert main(["simulate", str(tmp_path / "a.npz"), *SMALL]) == 0
    ids[:] = 3
    np.savez(tmp_path / "a.npz", topk_ids=ids, n_experts=16)
    capsys.readouterr()
    assert main(["simulate", str(tmp_path / "a.npz"), *SMALL, "--placement", "eplb"]) == 2
    assert "too many to simulate" in capsys.readouterr().err


def test_too_little_memory(tmp_path):
    with open(tmp_path / "large.npy", "wb") as stream:
        stream.write(b"\x93NUMPY\2\0" + (80).to_bytes(4, "little") +
                     f"{{'descr': '<i8', 'fortran_order': False, 'shape': ({MIB // 2}, 1, 128), }}".encode().ljust(80))
        stream.truncate(stream.tell() + 512 * MIB)  # zeros, and no blocks on the disk
    program = """if True:
        import resource, sys, lplb.cli.simulate.options
        from lplb.cli.main import main
        size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize() + (200 << 20)
        resource.setrlimit(resource.RLIMIT_AS, (size, size))
        sys.exit(main(["simulate", sys.argv[1]]))"""
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "large.npy")], capture_output=True, timeout=120)
    one_sentence(done, "too large for the memory", 2)


# ---- results ----

@pytest.mark.parametrize("option", ["--json", "--plot"])
def test_results_that_cannot_be_written(small, option, monkeypatch):
    monkeypatch.chdir(small.parent)
    ending = ".png" if option == "--plot" else ".json"
    os.mkdir(f"folder{ending}")
    os.mkfifo(f"pipe{ending}")
    os.symlink("/dev/full", f"full{ending}")
    for path, says in ((f"folder{ending}", "is a directory"), (f"small.npz/x{ending}", "Not a directory"),
                       (f"none/x{ending}", "does not exist"),
                       (f"full{ending}", "No space left"), (f"pipe{ending}", "cannot write")):
        one_sentence(command("simulate", small, *SMALL, option, path), says, 2)
    assert sorted(os.listdir()) == sorted([f"folder{ending}", f"pipe{ending}", f"full{ending}", "small.npz"])


def test_results_that_may_not_be_written(small):
    (small.parent / "fixed").mkdir()
    (small.parent / "out.json").write_text("before")
    root = os.geteuid() == 0
    (small.parent / "out.json").chmod(0o400)
    (small.parent / "fixed").chmod(0o500)
    if root:
        os.seteuid(65534)
    try:
        for path in (small.parent / "out.json", small.parent / "fixed" / "out.json"):
            with pytest.raises(UsageError, match="may not be written|Permission denied|does not exist"):
                files.check_writable(str(path), "--json")
    finally:
        if root:
            os.seteuid(0)


def test_results_do_not_overwrite_what_is_read_or_each_other(small, monkeypatch, capsys):
    monkeypatch.chdir(small.parent)
    os.symlink("small.npz", "link.json")
    before = small.read_bytes()
    for words in (["--json", "small.npz"], ["--json", "./link.json"], ["--json", "out.png", "--plot", "./out.png"],
                  ["--history", "small.npz", "--json", small]):
        assert main(["simulate", "small.npz", *SMALL, *map(str, words)]) == 2
        assert "would overwrite the" in capsys.readouterr().err
    assert small.read_bytes() == before and not os.path.exists("out.png")


def test_a_result_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "out.json"
    path.write_text("before")
    path.chmod(0o640)
    os.symlink("out.json", tmp_path / "link.json")
    honest = os.replace

    def interrupt(*names):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        common.write_json(str(path), {})
    assert path.read_text() == "before" and len(os.listdir(tmp_path)) == 2
    monkeypatch.setattr(os, "replace", honest)
    common.write_json(str(tmp_path / "link.json"), {"a": np.float32(1)})
    assert json.loads(path.read_text()) == {"a": 1.0} and path.stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "link.json").is_symlink() and len(os.listdir(tmp_path)) == 2


def test_a_full_disk_on_a_result(tmp_path):
    import resource

    def full():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (512, 512))

    (tmp_path / "out.json").write_text("before")
    np.savez(tmp_path / "a.npz", topk_ids=np.random.default_rng(1).integers(0, 16, (40, 1, 2)), n_experts=16)
    done = command("simulate", tmp_path / "a.npz", *SMALL, "--json", tmp_path / "out.json", preexec_fn=full)
    one_sentence(done, "cannot write", 2)
    assert (tmp_path / "out.json").read_text() == "before" and sorted(os.listdir(tmp_path)) == ["a.npz", "out.json"]


def test_results_into_a_device_or_a_pipe(small):
    done = subprocess.run(["bash", "-c", f'"{sys.executable}" -m lplb simulate "{small}" --tokens-per-rank 2 --json >(cat >&2)'],
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and json.loads(done.stderr)["rows"] and "proven optimal" in done.stdout
    assert command("simulate", small, *SMALL, "--json", "/dev/null").returncode == 0


def test_names_that_matplotlib_would_typeset(small, tmp_path, capsys):
    for name in ("a$b$.npz", "$\\frac$.npz", "\U0001f600$_$.npz", "%s{}.npz"):
        os.rename(small, tmp_path / name)
        small = tmp_path / name
        for ending in ("png", "svg", "pdf") if "frac" in name else ("svg",):
            assert main(["simulate", str(small), *SMALL, "--plot", str(tmp_path / f"out.{ending}")]) == 0
            assert capsys.readouterr().err == "" and (tmp_path / f"out.{ending}").stat().st_size > 5000
    row = {"suite": "$\\frac", "case": "$x$", "p50_us": 1, "p99_us": 2, "machine": "a$\\$", "note": None}
    (tmp_path / "rows.json").write_text(json.dumps({"rows": [row], "device": "$", "date": "$\x1b"}))
    assert bench_plot.main([str(tmp_path / "rows.json"), str(tmp_path / "rows.svg")]) == 0, capsys.readouterr().err


def test_drawing_a_bench_again_ends_in_sentences(tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps({"rows": [{"p50_us": 1, "p99_us": 2}], "device": "cpu"}))
    for words, says in (([], "two arguments"), (["gone.json", "a.png"], "no such file"), (["rows.json", "a.txt"], ".png, .svg or .pdf"),
                        (["rows.json", "none/a.png"], "does not exist"), (["rows.json", "rows.json"], "would overwrite")):
        one_sentence(command(*words, module="lplb.cli.bench.plot", cwd=tmp_path), says, 2)
    assert command("rows.json", "a.png", module="lplb.cli.bench.plot", cwd=tmp_path).returncode == 0


# ---- what stands around the command ----

def test_a_library_that_cannot_be_looked_at(tmp_path):
    for path in ("x" * 300, "x" * 5000, str(tmp_path), os.devnull):
        one_sentence(command("--library", LPLB_LIBRARY=path), "", 1)
        done = command(LPLB_LIBRARY=path)
        assert done.returncode == 1 and b"OFF   library" in done.stdout and done.stderr == b""
        one_sentence(command("simulate", LPLB_LIBRARY=path), "", 1)


def test_settings_of_matplotlib_that_it_refuses(small):
    done = command("simulate", small, *SMALL, "--plot", small.parent / "a.png", MPLBACKEND="no such thing")
    one_sentence(done, "--plot: matplotlib cannot be used", 2)


def test_a_working_directory_that_is_gone(tmp_path):
    (tmp_path / "gone").mkdir()
    done = subprocess.run(["bash", "-c",
                           f'cd "{tmp_path}/gone" && rmdir "{tmp_path}/gone" && "{sys.executable}" -m lplb simulate --json out.json'],
                          capture_output=True, timeout=120)
    one_sentence(done, "--json out.json: ", 2)


@pytest.mark.parametrize("columns", ["0", "1", "-5", DIGITS, "many"])
def test_terminals_of_any_width(columns):
    for words in (["--help"], ["simulate", "--help"]):
        done = command(*words, COLUMNS=columns)
        assert done.returncode == 0 and done.stderr == b"" and b"usage" in done.stdout


@pytest.mark.parametrize("error", [RuntimeError("torn\nin two"), TypeError(), UnicodeDecodeError("utf-8", b"x", 0, 1, "x"),
                                   RecursionError("deep")])
def test_a_check_that_cannot_be_carried_out_is_off(monkeypatch, capsys, error):
    def fails():
        raise error

    monkeypatch.setattr(selfcheck, "CHECKS", (("first", fails), ("second", lambda: "fine")))
    assert report.main() == 1
    said = capsys.readouterr().out
    assert f"OFF   {'first':<33}{type(error).__name__}" in said and "ok    second" in said and "1 of" in said


def test_torch_and_metadata_that_are_damaged(monkeypatch, capsys, tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise RuntimeError('built for\\nanother numpy')")
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = command(PYTHONPATH=path)
    assert done.returncode == 1 and done.stderr == b""
    assert b"OFF   torch" in done.stdout and b"RuntimeError: built for another numpy" in done.stdout
    one_sentence(command("bench", "--device", "cuda", PYTHONPATH=path), "torch cannot be imported", 2)

    def damaged(name):
        raise OSError("disk")

    monkeypatch.setattr(report.metadata, "version", damaged)
    assert [finding.state for finding in report._package()] == ["off"]
    assert {finding.state for finding in report._python_packages()} == {"ok", "note"}
    monkeypatch.setattr(report.metadata, "version", lambda name: None)
    assert [finding.state for finding in report._package()] == ["off"]


def test_what_nobody_thought_of_is_a_sentence_too(capsys, monkeypatch):
    def fails():
        raise ZeroDivisionError("a\x1bb\nc")

    assert guarded(fails) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("lplb: unexpected ZeroDivisionError: a\\x1bb c") and "LPLB_TRACEBACK=1" in said
    monkeypatch.setenv("LPLB_TRACEBACK", "1")
    with pytest.raises(ZeroDivisionError):
        guarded(fails)


def test_exit_codes_of_what_is_raised(capsys):
    def raising(error):
        def work():
            raise error
        return guarded(work), capsys.readouterr().err

    assert raising(MemoryError()) == (1, "lplb: out of memory\n")
    assert raising(KeyboardInterrupt()) == (130, "lplb: interrupted\n")
    assert raising(UsageError("a: b")) == (2, "lplb: a: b\n")
    assert raising(FileNotFoundError(2, "gone", "a\nfile")) == (1, "lplb: a\\nfile: gone\n")
    assert raising(TimeoutError("slow")) == (1, "lplb: TimeoutError: slow\n")
