# shellcheck shell=bash
# What a script says while it works: steps with their seconds, a line every few seconds for whatever
# takes longer, and the table at the end. Sourced; runs nothing by itself.

# Seconds between two lines about the same wait; more where nobody watches.
SAY_EVERY=4
[ -t 1 ] || SAY_EVERY=30

STEP=""
STEP_BEGAN=$SECONDS
CHECKS=()
CHECKS_BROKEN=0

# step WORDS: closes the step before and opens the next.
step() {
  step_end
  STEP=$1
  STEP_BEGAN=$SECONDS
  printf '\n== %s\n' "$STEP"
}

step_end() {
  [ -z "$STEP" ] || printf '   (%d s)\n' $((SECONDS - STEP_BEGAN))
  STEP=""
}

note() { printf '   %s\n' "$*"; }

warn() { printf '%s\n' "$*" >&2; }

# die WORDS: a sentence for a person, exit code 1.
die() {
  warn "$*"
  exit 1
}

# wait_for LIMIT_SECONDS WHAT COMMAND...: asks COMMAND again and again until it agrees.
wait_for() {
  local limit=$1 what=$2 began=$SECONDS said=$SECONDS
  shift 2
  until "$@"; do
    if ((SECONDS - began >= limit)); then
      warn "   gave up after $limit s waiting for $what"
      return 1
    fi
    if ((SECONDS - said >= SAY_EVERY)); then
      note "waiting for $what: $((SECONDS - began)) s of at most $limit"
      said=$SECONDS
    fi
    sleep 0.2
  done
}

# run LIMIT_SECONDS LOG WHAT COMMAND...: COMMAND with its output in LOG; on failure the log's end is shown.
run() {
  local limit=$1 log=$2 what=$3 code=0
  shift 3
  "$@" >>"$log" 2>&1 </dev/null &
  finish $! "$limit" "$log" "$what" || code=$?
  return "$code"
}

# finish PID LIMIT_SECONDS LOG WHAT: waits for a child started in the background.
finish() {
  local pid=$1 limit=$2 log=$3 what=$4 code=0
  if ! wait_for "$limit" "$what" ended "$pid"; then
    kill -TERM "$pid" 2>/dev/null || true
    code=124
  fi
  wait "$pid" || code=${code/#0/$?}
  if ((code != 0)); then
    warn "   $what failed (exit code $code); the end of $log:"
    tail -n 15 "$log" | sed 's/^/   | /' >&2
  fi
  return "$code"
}

# end_children: a script that was interrupted leaves no build or installation running behind it.
end_children() { jobs -p | xargs -r kill -TERM 2>/dev/null || true; }

# A child that is gone or a zombie has ended.
ended() {
  local stat
  stat=$(cat "/proc/$1/stat" 2>/dev/null) || return 0
  [[ ${stat##*) } == Z* ]]
}

# held CHECK SEEN / broke CHECK SEEN: one line of the table.
held() {
  CHECKS+=("$1"$'\t'"$2"$'\t'"ok")
  note "ok: $1: $2"
}

broke() {
  CHECKS+=("$1"$'\t'"$2"$'\t'"FAILED")
  CHECKS_BROKEN=$((CHECKS_BROKEN + 1))
  note "FAILED: $1: $2"
}

# judge CHECK SEEN WANTED: holds if what was seen is exactly what was wanted.
judge() {
  if [ "$2" = "$3" ]; then
    held "$1" "$2"
  else
    broke "$1" "$2 (wanted: $3)"
  fi
}

# table: every check of this run, one line each.
table() {
  printf '\n'
  {
    printf 'check\twhat was seen\t\n'
    printf '%s\n' "${CHECKS[@]}"
  } | columns
}

# Tab-separated lines, aligned.
columns() {
  awk -F '\t' '
    { for (i = 1; i <= NF; i++) { cell[NR, i] = $i; if (length($i) > wide[i]) wide[i] = length($i) }
      if (NF > most) most = NF }
    END { for (r = 1; r <= NR; r++) {
            line = ""
            for (i = 1; i <= most; i++) line = line sprintf("%-" wide[i] "s  ", cell[r, i])
            sub(/ +$/, "", line); print line } }'
}
