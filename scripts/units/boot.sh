#!/usr/bin/env bash
# boot.sh DIR: boots this machine's systemd once more, as process 1 of namespaces of its own, on a copy-on-write
# view of this machine's files: what it writes is gone when it ends. Units that would touch the kernel
# that both share are masked. It runs until it is killed.
set -euo pipefail

DIR=$1
CGROUP=/sys/fs/cgroup
[ ! -d "$CGROUP/unified" ] || CGROUP=$CGROUP/unified

if [ "${2:-}" != inside ]; then
  mkdir -p "$DIR/upper" "$DIR/root" "$CGROUP/raymtls-units"
  echo $$ >"$CGROUP/raymtls-units/cgroup.procs"
  exec unshare --mount --pid --fork --cgroup --uts --ipc --net --kill-child bash "$0" "$DIR" inside
fi

mount --make-rprivate /
mount -t tmpfs tmpfs "$DIR/upper"
mkdir "$DIR/upper/files" "$DIR/upper/work"
ROOT=$DIR/root
mount -t overlay overlay -o "lowerdir=/,upperdir=$DIR/upper/files,workdir=$DIR/upper/work" "$ROOT"
mount -t proc proc "$ROOT/proc"
mount -t sysfs -o ro sysfs "$ROOT/sys"
mount -t tmpfs tmpfs "$ROOT/sys/fs/cgroup" 2>/dev/null || true
mount -t cgroup2 cgroup2 "$ROOT/sys/fs/cgroup"
mount --rbind /dev "$ROOT/dev"
mount -t tmpfs -o mode=0755 tmpfs "$ROOT/run"
mount -t tmpfs -o mode=1777 tmpfs "$ROOT/tmp"
printf '%032d\n' 1 >"$ROOT/etc/machine-id"
for unit in systemd-sysctl.service systemd-binfmt.service systemd-modules-load.service systemd-udevd.service \
  systemd-udev-trigger.service proc-sys-fs-binfmt_misc.automount proc-sys-fs-binfmt_misc.mount \
  sys-kernel-debug.mount sys-kernel-tracing.mount sys-fs-fuse-connections.mount dev-hugepages.mount \
  systemd-remount-fs.service systemd-random-seed.service; do
  ln -sf /dev/null "$ROOT/etc/systemd/system/$unit"
done
cat >"$ROOT/etc/systemd/system/raymtls-units.target" <<'UNIT'
[Unit]
Description=As much of the system as the units under test need
Requires=basic.target
After=basic.target
UNIT
mkdir "$ROOT/run/.before"
cd "$ROOT"
pivot_root . run/.before
umount -l /run/.before
exec env -i container=namespace PATH=/usr/sbin:/usr/bin:/sbin:/bin \
  /lib/systemd/systemd --system --unit=raymtls-units.target --show-status=0 </dev/null
