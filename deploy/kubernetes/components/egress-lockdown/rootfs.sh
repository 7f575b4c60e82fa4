#!/bin/sh
# Gathers a root file system that holds nft, the libraries it needs, rules.sh, and busybox for it: rootfs.sh DIRECTORY
# Wants nft and a static busybox to be installed (Debian: nftables, busybox-static).
set -eu

root=${1:?usage: rootfs.sh DIRECTORY}
here=$(cd "$(dirname "$0")" && pwd)
PATH=$PATH:/usr/sbin:/sbin
nft=$(command -v nft) || { echo "rootfs.sh: nft is not installed" >&2; exit 1; }
busybox=$(command -v busybox) || { echo "rootfs.sh: busybox is not installed" >&2; exit 1; }

mkdir -p "$root/bin" "$root/etc" "$root/lib64"
cp -L "$nft" "$root/bin/nft"
cp -L "$busybox" "$root/bin/busybox"
for applet in sh grep head; do ln -sf busybox "$root/bin/$applet"; done # all that rules.sh uses
# Libraries stay where the loader looks for them; a merged /usr is followed by its own links.
ldd "$nft" | while read -r name arrow path _; do
	case $name in
	/*) path=$name ;;
	*) [ "$arrow" = "=>" ] || continue ;;
	esac
	mkdir -p "$root$(dirname "$path")"
	cp -L "$path" "$root$path"
done
echo 'root:x:0:0:root:/:/bin/sh' >"$root/etc/passwd"
install -m 0755 "$here/rules.sh" "$root/rules.sh"
