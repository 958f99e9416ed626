"""What `compare` and `accuracy` share: commands that are run, timed and kept as they are shown, and what machine a record is of."""
import json
import os
import platform
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
# What a script's first word stands for.
PEERS = {
    "llama": "llama-cpp-python",
    "lm": "lm-eval",
    "hf": "transformers",
    "llmcompressor": "llm-compressor",
    "gptqmodel": "gptqmodel",
    "autoround": "auto-round",
    "finetune": "transformers",
}
# Wall seconds and peak resident bytes of a whole process, whose output is dropped.
TIMED = (
    "import resource,subprocess,sys,time,json;t=time.perf_counter();"
    "c=subprocess.run(sys.argv[1:],stdout=subprocess.DEVNULL);"
    "print(json.dumps([time.perf_counter()-t,resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss*1024]));sys.exit(c.returncode)"
)


class Failed(Exception):
    """A command that did not end well: what was run, how it ended, and the end of what it said."""


class Machine:
    """Runs commands; keeps what was run, with folders by name, and the versions of peers. `names`: path → how it is shown."""

    def __init__(self, args, names, work=None):
        self.args, self.work = args, work or tempfile.mkdtemp()
        names = {self.work: "$WORK", args.peers: "$PEERS", args.lowbit: "lowbit", HERE: "bench/peers", **names}
        self.names = {path: name for path, name in names.items() if path}
        self.commands, self.versions = [], {}

    def note(self, command):
        """Keeps a command and says it; returns it as it is shown."""
        text = " ".join(command)
        for path, name in sorted(self.names.items(), key=lambda p: -len(p[0])):
            text = text.replace(path, name)
        if text not in self.commands:
            self.commands.append(text)
        print(text, file=sys.stderr, flush=True)
        return text

    def run(self, command, env=None):
        """(stdout, wall seconds)"""
        text = self.note(command)
        start = time.perf_counter()
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **(env or {})})
        out, err = child.communicate()
        seconds = time.perf_counter() - start
        if child.returncode != 0:
            raise Failed(f"{text}: exit {child.returncode}\n{err[-2000:]}")
        return out, seconds

    def lowbit(self, *words):
        cache = os.path.join(self.work, "cache")
        return self.run([self.args.lowbit, "--quiet", *map(str, words)], {"LOWBIT_CACHE": cache})

    def timed(self, *words):
        """Wall seconds and peak resident bytes of a whole lowbit process with an empty cache."""
        words = ["--quiet", *map(str, words)]
        text = self.note([self.args.lowbit, *words])
        with tempfile.TemporaryDirectory(dir=self.work) as cache:
            command = [sys.executable, "-c", TIMED, self.args.lowbit, *words]
            done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "LOWBIT_CACHE": cache})
        if done.returncode != 0:
            raise Failed(f"{text}: exit {done.returncode}\n{done.stderr[-2000:]}")
        return json.loads(done.stdout)

    def first_byte(self, *words):
        """Milliseconds from starting lowbit to its first byte on stdout."""
        command = [self.args.lowbit, "--quiet", *map(str, words)]
        text = self.note(command)
        env = {**os.environ, "LOWBIT_CACHE": os.path.join(self.work, "cache")}
        start = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=env, bufsize=0) as child:
            byte = child.stdout.read(1)
            seconds = time.perf_counter() - start
            child.stdout.read()
        if child.returncode != 0 or not byte:
            raise Failed(f"{text}: exit {child.returncode}, {'no text' if not byte else 'text'}")
        return 1e3 * seconds

    def peer(self, venv, script, *words, env=None):
        """The JSON lines that a script of this folder prints in a peer's environment."""
        command = [os.path.join(self.args.peers, venv, "bin", "python"), os.path.join(HERE, script), *map(str, words)]
        out, _ = self.run(command, env)
        # Tools print JSON of their own over several lines.
        lines = [json.loads(line) for line in out.splitlines() if line.startswith('{"')]
        if not lines:
            raise Failed(f"{self.note(command)}: no result\n{out[-2000:]}")
        for line in lines:
            self.versions[PEERS[script.split("_")[0].split(".")[0]]] = line.get("version")
        return lines

    def facts(self):
        """The machine and the program, as records have them."""
        cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), "")
        flags = next((line.split() for line in open("/proc/cpuinfo") if line.startswith("flags")), [])
        levels = [f for f in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16") if f in flags]
        version, _ = self.run([self.args.lowbit, "--version"])
        facts = dict(date=time.strftime("%Y-%m-%d"), cpu=cpu, cores=os.cpu_count(), instructions=levels)
        return dict(facts, system=platform.system(), lowbit=version.strip())


def write(path, record):
    """A record, whole or not at all."""
    with open(path + ".part", "w") as f:
        json.dump(record, f, indent=1)
        f.write("\n")
    os.replace(path + ".part", path)


def number(v, unit):
    if unit == "bytes":
        return f"{v / 2**20:,.0f} MiB"
    return f"{v:,.1f} {unit}" if v < 1000 else f"{v:,.0f} {unit}"
