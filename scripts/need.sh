#!/bin/sh
# Makes sure that tools are there: need.sh TOOL...   TOOL: redis-server, chromium, node, python (3, with venv)
#
# What is missing is installed through apt. Where Debian's node is too old for the client libraries that are tested (they ask for 20), a
# newer one comes from npm into build/tools, where tests/clients.rs looks first. What cannot be had ends the run with one sentence.
set -eu

node_at_least=20

fail() {
    echo "need.sh: $*" >&2
    exit 1
}

has() {
    command -v "$1" >/dev/null 2>&1
}

apt_install() {
    has apt-get || fail "$1 is missing and there is no apt-get to install it with; install it by hand and run this again."
    as_root=
    if [ "$(id -u)" -ne 0 ]; then
        has sudo || fail "$1 is missing; install it as root: apt-get install $*"
        as_root="sudo -n"
    fi
    log=$(mktemp)
    # The lists of a fresh machine are empty; of another one they may be stale, which only shows when the package is asked for.
    $as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "$@" >"$log" 2>&1 ||
        { $as_root apt-get update >>"$log" 2>&1 && $as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "$@" >>"$log" 2>&1; } ||
        fail "apt-get install $* failed: $(tail -n 1 "$log")"
    rm -f "$log"
}

need_python() {
    if ! has python3; then apt_install python3 python3-venv; fi
    # Debian's python3 comes without what makes virtual environments.
    if ! python3 -c 'import ensurepip, venv' 2>/dev/null; then apt_install python3-venv; fi
}

is_new_node() {
    has "$1" && [ "$("$1" -p 'parseInt(process.versions.node)')" -ge "$node_at_least" ]
}

need_node() {
    if ! has node; then apt_install nodejs npm; fi
    if ! has npm; then apt_install npm; fi
    if is_new_node node || is_new_node build/tools/node_modules/.bin/node; then return; fi
    mkdir -p build/tools
    npm install --silent --no-save --prefix build/tools node@22 >/dev/null 2>&1 && is_new_node build/tools/node_modules/.bin/node ||
        fail "node $node_at_least or newer is needed, this machine has $(node --version), and npm has no newer one to give; install one from nodejs.org."
}

cd "$(dirname "$0")/.."
for tool in "$@"; do
    case $tool in
    redis-server) has redis-server || apt_install redis-server ;;
    chromium) has chromium || apt_install chromium ;;
    node) need_node ;;
    python) need_python ;;
    *) fail "it does not know how to get '$tool'." ;;
    esac
done
