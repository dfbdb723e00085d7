#!/usr/bin/env bash
# The first process of a host, in namespaces of its own: name, home, /tmp, /run and /dev/shm are the host's alone, and
# the rest of the machine's root is read-only to it. What is below /tmp on the machine is seen where it is KEPT.
#   boot.sh NAME PLACE SHARED KEPT...
set -euo pipefail
name=$1 place=$2 shared=$3
shift 3

mount --make-rprivate /
hostname "$name"
mount -t tmpfs tmpfs /mnt
mkdir /mnt/home /mnt/shared
mount --bind "$place/home" /mnt/home
mount --bind "$shared" /mnt/shared
mount --bind "$place/passwd" /etc/passwd
mount --bind "$place/hosts" /etc/hosts
for index in $(seq $#); do
    mkdir "/mnt/kept$index"
    mount --bind "${!index}" "/mnt/kept$index"
done
mount --bind "$place/tmp" /tmp
for index in $(seq $#); do
    path=${!index}
    test -e "$path" || { mkdir -p "$path" && mount --bind "/mnt/kept$index" "$path"; }
done
mount -t tmpfs tmpfs /run
mkdir /run/sshd
mount -t tmpfs -o size=16g tmpfs /dev/shm
mount -o remount,bind,ro /

touch /mnt/home/booted
# Not exec: as process 1 bash also collects the children of processes that have ended, which `ray stop` waits for.
/usr/sbin/sshd -D -e -f /mnt/home/.ssh/sshd_config &
wait
