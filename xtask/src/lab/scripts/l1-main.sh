#!/bin/busybox sh
# Process 1 of L1. With /lab/.command it runs that, its output on the first virtio port and its exit status on the
# second; without, it gives a shell on the serial console. Either way the machine then powers off.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root TERM="${TERM:-linux}" LANG=C.UTF-8

mkdir -p /dev/pts /dev/shm /dev/hugepages
mount -t devpts -o mode=620,ptmxmode=666 devpts /dev/pts
mount -t tmpfs -o mode=1777 shm /dev/shm
mount -t tmpfs -o mode=1777 tmp /tmp
mount -t tmpfs -o mode=755 run /run
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t tracefs tracefs /sys/kernel/tracing
ln -sf /proc/self/fd /dev/fd
ln -sf /proc/self/fd/0 /dev/stdin
ln -sf /proc/self/fd/1 /dev/stdout
ln -sf /proc/self/fd/2 /dev/stderr
ifconfig lo up
hostname lab
mkdir -p /lab/out
# No VM on CPU 0: see "What the emulator gets wrong" in lab/mod.rs. Whatever starts from here inherits it.
taskset -pc 1-$(($(nproc) - 1)) $$ >/dev/null || echo "fail L1's programs cannot be kept off CPU 0" >/dev/vport0p2

. /lab/.environment
cd /lab

if [ -e /lab/.command ]; then
	if [ -c /dev/kvm ]; then
		echo up >/dev/vport0p2
		# Debian's timeout and sh, not busybox's: this one ends the whole group, and says so with status 124.
		/usr/bin/timeout -k 5 "$CPR_LAB_LIMIT" /bin/sh /lab/.command </dev/null >/dev/vport0p1 2>&1
		status=$?
	else
		echo "fail no /dev/kvm in L1" >/dev/vport0p2
		status=255
	fi
	if [ $status -ne 0 ]; then
		echo "lab: exit status $status; the kernel's last messages:"
		dmesg | tail -n 50
	fi
	if [ -n "$(ls -A /lab/out)" ]; then
		tar -C /lab/out -cf /dev/vport0p3 .
	fi
	echo "exit $status" >/dev/vport0p2
else
	exec </dev/ttyS0 >/dev/ttyS0 2>&1
	[ -n "$LAB_TTY_SIZE" ] && stty rows "${LAB_TTY_SIZE% *}" cols "${LAB_TTY_SIZE#* }"
	cat <<-'EOF'

	L1 is up. The files of this run are in /lab: cpr-vmm, vmlinux, bzImage, initrd. Start a guest, with

	  ./cpr-vmm -nographic -object memory-backend-memfd,id=ram0,size=256M -machine memory-backend=ram0 \
	      -smp 2 -kernel vmlinux -initrd initrd -append "$CPR_LAB_APPEND ECHO=1"

	Its keys: Ctrl-a Ctrl-a c for its monitor, Ctrl-a Ctrl-a x to end it: one Ctrl-a belongs to L1's console.
	exit, Ctrl-D or poweroff switches L1 off; Ctrl-a x does at once.

	EOF
	cat >/tmp/.bashrc <<-'EOF'
	PS1='L1:\w# '
	poweroff() { sync; echo o >/proc/sysrq-trigger; sleep 60; }
	EOF
	setsid -c bash --rcfile /tmp/.bashrc -i
fi

sync
echo o >/proc/sysrq-trigger
while :; do sleep 60; done
