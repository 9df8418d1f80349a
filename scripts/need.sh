#!/bin/sh
# Ensures that tools are installed: need.sh TOOL...
# TOOL is curl, redis-server, faketime, openssl, chromium, firefox, nginx, haproxy, caddy, apache,
# varnish, hitch, node or python (3, with venv).
#
# Installs missing tools with apt. If Debian's node is too old for the client libraries under test
# (they require 20), it installs a newer one with npm into build/tools, where tests/clients.rs looks
# first. If a tool cannot be installed, it exits with an error message.
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
    has apt-get || fail "$1 is missing and apt-get is not available; install it manually and retry"
    as_root=
    if [ "$(id -u)" -ne 0 ]; then
        has sudo || fail "$1 is missing; install it as root: apt-get install $*"
        as_root="sudo -n"
    fi
    log=$(mktemp)
    # The package lists may be missing or stale, which only shows when a package is requested:
    # update them after a first failure.
    $as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "$@" >"$log" 2>&1 ||
        { $as_root apt-get update >>"$log" 2>&1 && $as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "$@" >>"$log" 2>&1; } ||
        fail "apt-get install $* failed: $(tail -n 1 "$log")"
    rm -f "$log"
}

need_python() {
    if ! has python3; then apt_install python3 python3-venv; fi
    # Debian's python3 does not include the modules that create virtual environments.
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
        fail "node is $(node --version), but $node_at_least or newer is required and npm cannot install it; install it from nodejs.org"
}

cd "$(dirname "$0")/.."
for tool in "$@"; do
    case $tool in
    redis-server) has redis-server || apt_install redis-server ;;
    curl) has curl || apt_install curl ;;
    faketime) has faketime || apt_install faketime ;;
    openssl) has openssl || apt_install openssl ;;
    chromium) has chromium || apt_install chromium ;;
    firefox) has firefox-esr || apt_install firefox-esr ;;
    # Debian installs servers where only root has them in PATH.
    nginx) has nginx || [ -x /usr/sbin/nginx ] || apt_install nginx-light ;;
    haproxy) has haproxy || [ -x /usr/sbin/haproxy ] || apt_install haproxy ;;
    caddy) has caddy || apt_install caddy ;;
    # Without the package apache2, which starts a server on port 80.
    apache) has apache2 || [ -x /usr/sbin/apache2 ] || apt_install apache2-bin ;;
    varnish) has varnishd || [ -x /usr/sbin/varnishd ] || apt_install varnish ;;
    hitch) has hitch || [ -x /usr/sbin/hitch ] || apt_install hitch ;;
    node) need_node ;;
    python) need_python ;;
    *) fail "unknown tool '$tool'; use redis-server, curl, faketime, openssl, chromium, firefox, nginx, haproxy, caddy, apache, varnish, hitch, node or python" ;;
    esac
done
