"""What the stories ask of a driver's log, of a status and of metrics.

ask.py count LOG KIND HOST OUTCOME [FROM [TO]]    attempts that began within these seconds of the epoch
ask.py last LOG KIND HOST OUTCOME                 end of the last one, 0 if there is none
ask.py longest LOG KIND HOST                      seconds of the longest one that went well
ask.py why LOG KIND HOST                          of the first that failed
ask.py pids LOG KIND HOST                         how many processes answered
ask.py driver LOG FIELD                           out of the first line
ask.py status FIELD...                            of JSON on standard input; a moment as seconds of the epoch
ask.py served KIND FIELD                          of the first process of a kind in a status on standard input
ask.py steps                                      of a recycle's JSON on standard input: each with its seconds
ask.py watched LOG leaves|gap                     of watch.py: different leaves; seconds from the old one to the new
ask.py metric NAME                                of metrics on standard input: its value, without a sample 0
"""

import json
import sys
from datetime import datetime
from pathlib import Path


def records(path):
    text = Path(path).read_text() if Path(path).exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def attempts(path, kind, host, outcome=None):
    tried = [r for r in records(path) if "outcome" in r]
    wanted = [r for r in tried if kind in ("any", r["kind"]) and host in ("any", r["host"])]
    return [r for r in wanted if outcome is None or r["outcome"] == outcome]


def count(path, kind, host, outcome, begin="0", end="inf"):
    begin, end = float(begin), float(end)
    return sum(begin <= r["began"] < end for r in attempts(path, kind, host, outcome))


def last(path, kind, host, outcome):
    return max((r["ended"] for r in attempts(path, kind, host, outcome)), default=0)


def longest(path, kind, host):
    return max((round(r["ended"] - r["began"], 1) for r in attempts(path, kind, host, "ok")), default=0)


def why(path, kind, host):
    return next((r["why"].split("\n")[0] for r in attempts(path, kind, host, "failed")), "none failed")


def pids(path, kind, host):
    return len({r["seen"] for r in attempts(path, kind, host, "ok")})


def driver(path, field):
    return next((r[field] for r in records(path) if r["kind"] == "driver"), "nothing")


def plain(value):
    try:
        return int(datetime.fromisoformat(value.replace("Z", "+00:00")).timestamp())
    except (AttributeError, ValueError):
        return value


def status(*fields):
    seen = json.load(sys.stdin)
    for field in fields:
        seen = seen[int(field)] if isinstance(seen, list) else (seen or {}).get(field)
    return plain(seen)


def served(kind, field):
    processes = (json.load(sys.stdin).get("served") or {}).get("processes", [])
    values = [p for p in processes if p["kind"] == kind]
    if not values:
        return "nothing"
    if field == "job":
        return (values[0].get("job") or {}).get("id", "nothing")
    leaves = [s["serves"]["serial"] for s in values[0]["sockets"] if s["serves"]["what"] == "leaf"]
    return (leaves or ["nothing"])[0] if field == "serial" else plain(values[0].get(field))


def steps():
    return ", ".join(f"{step['step']} {step['seconds']:.1f} s" for step in json.load(sys.stdin)["done"])


def watched(path, what):
    seen = [line.split() for line in Path(path).read_text().splitlines()]
    seen = [(float(at), serial) for at, serial in seen if serial != "none"]
    if what == "leaves":
        return len({serial for _, serial in seen})
    old = seen[0][1]
    new = [at for at, serial in seen if serial != old]
    return round(new[0] - max(at for at, serial in seen if serial == old), 1) if new else "inf"


def metric(name):
    values = [line.rsplit(" ", 1)[1] for line in sys.stdin if line.startswith(name + " ")]
    return values[0].strip() if values else 0


if __name__ == "__main__":
    print(globals()[sys.argv[1]](*sys.argv[2:]))
