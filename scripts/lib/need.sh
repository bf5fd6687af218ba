# shellcheck shell=bash
# What the scripts need from the machine, and how they get it: Debian packages, one virtual
# environment with Ray, cargo. Sourced after say.sh; runs nothing by itself.

RAY_VERSION=${RAY_VERSION:-2.60.0}
# Ray runs as this bare uid and gid: no account is made.
RAY_UID=61001
RAY_GID=61001

if [ "$(id -u)" = 0 ]; then
  BASE=/var/tmp/ray-mtls
else
  BASE=/var/tmp/ray-mtls-$(id -u)
fi
VENV=$BASE/venv
APT_LIST=$BASE/apt-packages

# Seconds an installation may take.
INSTALL_MAX=900

# need_base: the folder for everything the scripts make outside the repository. Programs in it are run,
# so it must not be somebody else's.
need_base() {
  umask 022
  mkdir "$BASE" 2>/dev/null || true
  if [ -L "$BASE" ] || [ "$(stat -c %u "$BASE")" != "$(id -u)" ]; then
    die "$BASE is there and belongs to somebody else: remove it first"
  fi
  chmod 0755 "$BASE"
  mkdir -p "$BASE/logs"
}

# need_command COMMAND PACKAGE...: installs the packages if the command is missing.
need_command() {
  local command=$1
  shift
  command -v "$command" >/dev/null || need_packages "$@"
}

# need_packages PACKAGE...: installs them and writes down which ones are new.
need_packages() {
  command -v apt-get >/dev/null ||
    die "missing: $*. There is no apt-get here: install them with this system's package manager and run again"
  [ "$(id -u)" = 0 ] || die "missing: $*. As root: apt-get install $*"
  note "installing $*"
  run "$INSTALL_MAX" "$BASE/logs/apt.log" "the package lists" apt-get update -q
  DEBIAN_FRONTEND=noninteractive run "$INSTALL_MAX" "$BASE/logs/apt.log" "the packages $*" \
    apt-get install -y -q --no-install-recommends "$@"
  printf '%s\n' "$@" >>"$APT_LIST"
}

# need_ray: a virtual environment with ray[default], shared by quickstart and tests.
need_ray() {
  local python want
  python=$(find_python) || die "no usable Python 3.10 or newer: Ray's user must be able to reach it. Install python3"
  want="ray $RAY_VERSION, $("$python" --version)"
  exec 8>"$BASE/venv.lock"
  flock -n 8 || wait_for "$INSTALL_MAX" "another run that is making $VENV" flock -n 8
  if [ "$(cat "$VENV/.complete" 2>/dev/null)" != "$want" ]; then
    make_venv "$python"
    printf '%s\n' "$want" >"$VENV/.complete"
  fi
  exec 8>&-
  note "ray $RAY_VERSION in $VENV"
}

make_venv() {
  local python=$1
  "$python" -c 'import ensurepip, venv' 2>/dev/null || need_packages python3-venv
  note "making $VENV with $python"
  rm -rf "$VENV"
  "$python" -m venv "$VENV"
  PIP_ROOT_USER_ACTION=ignore run "$INSTALL_MAX" "$BASE/logs/pip.log" "ray[default] $RAY_VERSION" \
    "$VENV/bin/python" -m pip install --quiet "ray[default]==$RAY_VERSION"
}

# The first Python that is new enough and that Ray's uid can run: one under a closed home is not.
find_python() {
  local candidate real
  for candidate in /usr/bin/python3 python3 python3.13 python3.12 python3.11 python3.10; do
    real=$("$candidate" -c 'import sys
if sys.version_info >= (3, 10): print(getattr(sys, "_base_executable", sys.executable))' 2>/dev/null) || continue
    if [ -n "$real" ] && as_others "$real" -c '' 2>/dev/null; then
      printf '%s\n' "$real"
      return 0
    fi
  done
  return 1
}

# as_others COMMAND...: as the uid that will run Ray; without root that is the caller.
as_others() {
  if [ "$(id -u)" = 0 ]; then
    setpriv --reuid "$RAY_UID" --regid "$RAY_GID" --clear-groups "$@"
  else
    "$@"
  fi
}

# need_nginx: the program; the server that Debian starts with it is not wanted.
need_nginx() {
  ! command -v nginx >/dev/null || return 0
  need_packages nginx-light
  systemctl disable --now nginx 2>/dev/null || service nginx stop 2>/dev/null || true
}

# need_promtool: the program alone, out of Debian's package: an installation would start a server too.
PROMTOOL=$BASE/prometheus/usr/bin/promtool
need_promtool() {
  local folder
  ! command -v promtool >/dev/null || PROMTOOL=$(command -v promtool)
  [ ! -x "$PROMTOOL" ] || return 0
  command -v apt-get >/dev/null || die "missing: promtool. Install Prometheus with this system's package manager and run again"
  note "fetching promtool"
  folder=$(mktemp -d)
  run "$INSTALL_MAX" "$BASE/logs/apt.log" "the package prometheus" fetch_package prometheus "$folder"
  mkdir -p "$BASE/prometheus/usr/bin"
  mv "$folder/tree/usr/bin/promtool" "$PROMTOOL"
  rm -rf "$folder"
}

# fetch_package PACKAGE FOLDER: its files, in FOLDER/tree; nothing is installed.
fetch_package() {
  chmod 0755 "$2"
  cd "$2"
  apt-get download -q "$1" || { apt-get update -q && apt-get download -q "$1"; }
  dpkg-deb -x "$1"_*.deb "$2/tree"
}

# need_manifest_linters: what knows the schemas of Kubernetes and of CloudFormation, in a virtual environment.
KUBERNETES_VALIDATE_VERSION=1.37.0
CFN_LINT_VERSION=1.58.0
MANIFEST_LINTERS=$BASE/manifest-linters
need_manifest_linters() {
  need_python_program "$MANIFEST_LINTERS" \
    "kubernetes-validate==$KUBERNETES_VALIDATE_VERSION" "cfn-lint==$CFN_LINT_VERSION"
}

# need_python_program FOLDER PACKAGE==VERSION...: a virtual environment that holds just these.
need_python_program() {
  local python folder=$1
  shift
  [ "$(cat "$folder/.complete" 2>/dev/null)" != "$*" ] || return 0
  python=$(find_python) || die "no usable Python 3.10 or newer: install python3"
  "$python" -c 'import ensurepip, venv' 2>/dev/null || need_packages python3-venv
  note "making $folder with $python"
  rm -rf "$folder"
  "$python" -m venv "$folder"
  PIP_ROOT_USER_ACTION=ignore run "$INSTALL_MAX" "$BASE/logs/pip.log" "$*" \
    "$folder/bin/python" -m pip install --quiet --no-compile "$@"
  printf '%s\n' "$*" >"$folder/.complete"
}

need_cargo() {
  command -v cargo >/dev/null || PATH=$HOME/.cargo/bin:$PATH
  command -v cargo >/dev/null || die "cargo is missing: install Rust (the version in Cargo.toml or newer) and run again"
  need_command cc gcc libc6-dev
}

# need_sslyze: a judge of TLS listeners in a virtual environment of its own.
SSLYZE_VERSION=6.3.1
SSLYZE=$BASE/sslyze
need_sslyze() {
  need_python_program "$SSLYZE" "sslyze==$SSLYZE_VERSION"
}

# need_pkilint: a linter of certificates in a virtual environment of its own.
PKILINT_VERSION=0.13.3
PKILINT=$BASE/pkilint
need_pkilint() {
  need_python_program "$PKILINT" "pkilint==$PKILINT_VERSION"
}
