#!/bin/sh
# Closes the network of this pod, and only of this pod: loads one nftables table, lists it back, and fails when either
# does not work, so that the pod's other containers never start. Needs NET_ADMIN, and nothing that can be written.
#
#   API_ENDPOINTS   where SIDECAR_UID may connect to over TCP: "ADDRESS:PORT [ADDRESS6]:PORT ...".
#                   Default: KUBERNETES_SERVICE_HOST and KUBERNETES_SERVICE_PORT, which every container is given.
#   SIDECAR_UID     default 65532.
#   ALLOW_DNS       "true": SIDECAR_UID may also ask the name servers of /etc/resolv.conf. Default "false": the API
#                   server is found by address.
set -eu

TABLE=session_proxy_egress

fail() {
	echo "network-init: $*; the pod is not started" >&2
	exit 1
}

is_number() { # VALUE LOW HIGH
	case $1 in '' | *[!0-9]* | ??????????*) return 1 ;; esac
	[ "$1" -ge "$2" ] && [ "$1" -le "$3" ]
}

# Prints ip or ip6. Names are refused: what they resolve to may change, and nft would ask DNS for them.
family() { # ADDRESS
	case $1 in
	*[!0-9A-Fa-f:.]* | '') return 1 ;;
	*:*:*) echo ip6 && return ;;
	*[!0-9.]* | *:*) return 1 ;;
	*.*.*.*.* | *..* | .* | *.) return 1 ;;
	*.*.*.*) ;;
	*) return 1 ;;
	esac
	rest=$1.
	while [ -n "$rest" ]; do
		is_number "${rest%%.*}" 0 255 || return 1
		rest=${rest#*.}
	done
	echo ip
}

endpoints=${API_ENDPOINTS:-}
if [ -z "$endpoints" ]; then
	host=${KUBERNETES_SERVICE_HOST:-}
	port=${KUBERNETES_SERVICE_PORT:-}
	if [ -z "$host" ] || [ -z "$port" ]; then
		fail "neither API_ENDPOINTS nor KUBERNETES_SERVICE_HOST and _PORT are set"
	fi
	case $host in
	*:*) endpoints="[$host]:$port" ;;
	*) endpoints="$host:$port" ;;
	esac
fi
uid=${SIDECAR_UID:-65532}
is_number "$uid" 1 999999999 || fail "SIDECAR_UID is '$uid'; it must be a numeric user id other than 0"

accepts=
expected=0
accept() { # MATCH
	accepts="$accepts
		meta skuid $uid $1 accept"
	expected=$((expected + 1))
}

set -f
for endpoint in $endpoints; do
	port=${endpoint##*:}
	address=${endpoint%:*}
	case $address in
	\[*\]) address=${address#\[} address=${address%\]} ;;
	*:*) address= ;; # an IPv6 address without brackets
	esac
	if ! kind=$(family "$address") || ! is_number "$port" 1 65535; then
		fail "the API server's endpoint is '$endpoint'; it must be ADDRESS:PORT or [ADDRESS6]:PORT, and no name"
	fi
	accept "$kind daddr $address tcp dport $port"
done
[ "$expected" -gt 0 ] || fail "API_ENDPOINTS names no endpoint"

case ${ALLOW_DNS:-false} in
false) ;;
true)
	before=$expected
	while read -r keyword server _; do
		[ "$keyword" = nameserver ] || continue
		kind=$(family "$server") || fail "the name server '$server' is not an address"
		accept "$kind daddr $server udp dport 53"
		accept "$kind daddr $server tcp dport 53"
	done <"${RESOLV_CONF:-/etc/resolv.conf}"
	[ "$expected" -gt "$before" ] || fail "ALLOW_DNS is true and resolv.conf names no name server"
	;;
*) fail "ALLOW_DNS is '$ALLOW_DNS'; it must be true or false" ;;
esac

# One transaction: a container that is started again replaces the table, and there is no moment without one.
# Output: what is not accepted is refused at once, and dropped should the refusal itself not work. Input: so that nobody
# outside can open the connection that the runner may not. What a refusal sends back is "related".
nft -f - <<RULES || fail "the kernel did not take the rules (is NET_ADMIN granted, does it have nf_tables?)"
add table inet $TABLE
delete table inet $TABLE
table inet $TABLE {
	chain output {
		type filter hook output priority filter; policy drop;
		oifname "lo" accept
		ct state established,related accept
		icmpv6 type { nd-router-solicit, nd-neighbor-solicit, nd-neighbor-advert } accept$accepts
		meta l4proto tcp reject with tcp reset
		reject with icmpx admin-prohibited
	}
	chain input {
		type filter hook input priority filter; policy drop;
		iifname "lo" accept
		ct state established,related accept
		icmpv6 type { nd-router-advert, nd-neighbor-solicit, nd-neighbor-advert } accept
		meta l4proto tcp reject with tcp reset
		reject with icmpx admin-prohibited
	}
}
RULES

listed=$(nft -nn list table inet $TABLE) || fail "the rules cannot be listed"
for hook in output input; do
	case $listed in
	*"hook $hook "*"policy drop;"*) ;;
	*) fail "the listed rules have no $hook chain that drops" ;;
	esac
done
found=0
while read -r first second third _; do
	if [ "$first $second $third" = "meta skuid $uid" ]; then found=$((found + 1)); fi
done <<LISTED
$listed
LISTED
[ "$found" -eq "$expected" ] || fail "$found of $expected rules for user $uid are listed"
echo "$listed"
