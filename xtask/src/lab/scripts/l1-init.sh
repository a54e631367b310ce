#!/bin/busybox sh
# /init of L1's initramfs: the modules, the root disk (shared and read-only) under a throw-away overlay, this run's
# files in /lab, and on to /lab/.l1-main. The shell of busybox-static finds its applets without any links,
# through /proc/self/exe.
/bin/busybox mount -t proc proc /proc
mount -t devtmpfs dev /dev
mount -t sysfs sys /sys

die() {
	echo "lab: L1 cannot start: $1" >/dev/console
	echo "fail $1" >/dev/vport0p2
	echo o >/proc/sysrq-trigger
	sleep 60
}

load() {
	for module in "$1"/*.ko; do
		insmod "$module" || return 1
	done
}

load /vmm-modules &
vmm=$!
load /disk-modules || die "the modules of the disk do not load"

tries=0
until [ -b /dev/vda ]; do
	tries=$((tries + 1))
	[ $tries -gt 200 ] && die "no root disk"
	usleep 50000
done
mkdir -p /base /over /new
mount -t ext4 -o ro /dev/vda /base || die "the root disk does not mount"
mount -t tmpfs -o size=75% over /over || die "no tmpfs"
mkdir /over/upper /over/work
mount -t overlay -o lowerdir=/base,upperdir=/over/upper,workdir=/over/work root /new || die "no overlay"
mkdir -p /new/lab
mount -t tmpfs -o size=75% lab /new/lab
cp -a /payload/. /new/lab/ || die "the run's files do not fit"
wait $vmm || die "the modules of KVM and tun do not load"
mount --move /dev /new/dev
mount --move /sys /new/sys
mount --move /proc /new/proc
exec /bin/busybox switch_root /new /lab/.l1-main
