# Sourced by scripts/test, scripts/train and scripts/docs, with the argument
#   dev      for `.venv`, which has what is needed to develop, or
#   clients  for `.venv-clients`, which has the libraries that tests/clients drives.
# Makes that environment of this checkout, or brings it up to date, and sets
#   root    the folder of the checkout
#   python  the interpreter in the environment
#
# The file `fastopt-installed` in it says what is installed: a checksum of all that the installation depends on, or
# "unfinished" from its start to its end. An environment that was left unfinished is made again, one whose installation
# failed is installed into again; one without that file was made by somebody else, is installed into and never removed.

root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
case $1 in
  dev)
    venv=$root/.venv
    files=("$root"/{pyproject.toml,constraints.txt})
    packages=(--editable "$root[dev]")
    ;;
  clients)
    venv=$root/.venv-clients
    files=("$root"/{pyproject.toml,constraints.txt,requirements-clients.txt})
    # The list is complete, so that pip need not look for more (it says why).
    packages=(--no-deps --editable "$root" --requirement "$root/requirements-clients.txt")
    ;;
esac
python=$venv/bin/python
stamp=$venv/fastopt-installed

fail() {
  printf '%s: %s\n' "${0##*/}" "$1" >&2
  exit 1
}

wanted() {
  { printf '%s\n' "$root" && cat "${files[@]}" "${BASH_SOURCE[0]}"; } | cksum
}

installed() {
  [[ -r $stamp && $(<"$stamp") == "$(wanted)" ]] && "$python" -c '' 2>/dev/null
}

# The first Python that fits; one without venv and ensurepip (a package of its own on Debian) does not.
find_python() {
  local candidate check='import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))'
  for candidate in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 python3.11 python; do
    if "$candidate" -c "$check" >/dev/null 2>&1; then
      printf '%s\n' "$candidate"
      return
    fi
  done
  fail 'found no Python 3.11, 3.12 or 3.13 with its venv module (python3-venv on Debian); install one, or name it in PYTHON=/path/to/python3.'
}

install() {
  local interpreter code=0
  log=$(mktemp) || fail 'could not make a temporary file.'
  trap 'rm -f "$log"' EXIT
  if [[ -e $stamp && $(<"$stamp") == unfinished ]] || [[ -e $stamp && ! -x $python ]]; then
    rm -rf "$venv"
  fi
  if [[ ! -e $venv ]]; then
    interpreter=$(find_python) || exit
    printf 'Making %s with %s, this takes some minutes once.\n' "${venv##*/}" "$("$interpreter" --version)" >&2
    mkdir "$venv" || fail "cannot write into $root."
    printf 'unfinished\n' >"$stamp"
    "$interpreter" -m venv "$venv" >"$log" 2>&1 || { cat "$log" >&2; fail "could not make $venv."; }
  else
    "$python" -m pip --version >/dev/null 2>&1 || fail "$venv has no working Python with pip; remove it and run this again."
    printf 'Bringing %s up to date.\n' "${venv##*/}" >&2
    printf 'unfinished\n' >"$stamp"
  fi
  # --no-compile: most modules of these packages are never imported; the others are compiled when they first are.
  # What pip says matters only when it fails: many of its warnings are about this machine and not about us. The end of
  # it has the reason, which --quiet would leave out where versions conflict.
  PIP_USER=0 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore "$python" -m pip install --progress-bar off --no-input \
    --no-compile "${packages[@]}" --constraint "$root/constraints.txt" >"$log" 2>&1 || code=$?
  if ((code)); then
    tail -n 30 "$log" >&2
    # A pip that was killed may leave half of a package behind, one that gave up does not.
    ((code > 128)) || printf 'failed\n' >"$stamp"
    fail 'pip could not install fastopt and what it needs; its messages are above.'
  fi
  wanted >"$stamp"
}

if ! installed; then
  (
    # One at a time: a second command waits here, and finds the work done.
    if command -v flock >/dev/null; then
      exec 9>"$venv.lock"
      flock 9
    fi
    installed || install
  ) || exit
fi

# What a process has compiled is there for the next ones, of which the tests start hundreds.
unset PYTHONDONTWRITEBYTECODE
