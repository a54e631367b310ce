#!/bin/busybox sh
# /init of the L2 guest: a shell on the serial line, again and again. The shell of busybox-static finds its applets
# without any links, through /proc/self/exe; guest-agent is in /bin; driver modules are in /modules, and loaded if there
# is a virtio device on PCI. The shell does not echo what it reads, which makes it easy to drive by program; ECHO=1 on
# the kernel command line gives a person the echo and line editing.
export PATH=/bin HOME=/ TERM=linux
/bin/busybox mount -t proc proc /proc
mount -t devtmpfs dev /dev
mount -t sysfs sys /sys
mkdir -p /dev/pts /tmp
mount -t devpts devpts /dev/pts
mount -t tmpfs tmp /tmp
hostname guest
# Not at every boot: under emulation they take seconds. Their names are in the order to load them.
if grep -qs 0x1af4 /sys/bus/pci/devices/*/vendor; then
	for module in /modules/*.ko; do
		insmod "$module"
	done
fi
export PS1='@PROMPT@'
echo "guest: up after $(cut -d' ' -f1 /proc/uptime) s, $(nproc) cpus, clocksource $(cat /sys/devices/system/clocksource/clocksource0/current_clocksource)"
while :; do
	setsid cttyhack /bin/busybox sh -c '[ -n "$ECHO" ] || stty -echo; exec /bin/busybox sh -i'
done
