#!/bin/sh
# Closes the network of this pod, and only of this pod: loads one nftables table, lists it back, and fails when either
# does not work, so that the pod's other containers never start. Needs NET_ADMIN, and nothing that can be written.
#
#   API_ENDPOINTS   where SIDECAR_UID may connect to over TCP: "ADDRESS:PORT [ADDRESS6]:PORT ...".
#                   Default: KUBERNETES_SERVICE_HOST and KUBERNETES_SERVICE_PORT, which every container is given.
#   SIDECAR_UID     default 65532.
#   ALLOW_DNS       "true": SIDECAR_UID may also ask the name servers of /etc/resolv.conf. Default "false": the API
#                   server is found by address.
#   POD_IP, HOST_IP from the downward API. Equal in a pod with hostNetwork, which would close the node instead.
set -euf

TABLE=session_proxy_egress
MAX_UID=4294967294 # the next one means "no user"

fail() {
	echo "network-init: $*; the pod is not started" >&2
	exit 1
}

is_number() { # VALUE LOW HIGH, no leading zero: nft reads such a number as octal
	case $1 in '' | *[!0-9]* | 0?* | ???????????*) return 1 ;; esac
	[ "$1" -ge "$2" ] && [ "$1" -le "$3" ]
}

is_ip4() { # ADDRESS
	rest=$1.
	parts=0
	while [ -n "$rest" ]; do
		is_number "${rest%%.*}" 0 255 || return 1
		rest=${rest#*.}
		parts=$((parts + 1))
	done
	[ "$parts" -eq 4 ]
}

is_ip6() { # ADDRESS: eight groups, or fewer around one "::"
	case $1 in *[!0-9A-Fa-f:]* | *:::* | *::*::* | :[!:]* | *[!:]:) return 1 ;; esac
	rest=$1:
	parts=0
	while [ -n "$rest" ]; do
		case ${rest%%:*} in
		'') ;;
		?????*) return 1 ;;
		*) parts=$((parts + 1)) ;;
		esac
		rest=${rest#*:}
	done
	case $1 in *::*) [ "$parts" -lt 8 ] ;; *) [ "$parts" -eq 8 ] ;; esac
}

# Prints ip or ip6. Names are refused: what they resolve to may change, and nft would ask DNS for them.
family() { # ADDRESS
	if is_ip4 "$1"; then echo ip; elif is_ip6 "$1"; then echo ip6; else return 1; fi
}

if [ -n "${POD_IP:-}" ] && [ "$POD_IP" = "${HOST_IP:-}" ]; then
	fail "POD_IP and HOST_IP are both '$POD_IP', so this is the node's network (hostNetwork), which stays as it is"
fi

uid=${SIDECAR_UID:-65532}
is_number "$uid" 1 "$MAX_UID" || fail "SIDECAR_UID is '$uid'; it must be a numeric user id other than 0"

accepts=
accept() { # MATCH
	accepts="$accepts
		meta skuid $uid $1 accept"
}

variable=API_ENDPOINTS
endpoints=${API_ENDPOINTS:-}
if [ -z "$endpoints" ]; then
	variable="KUBERNETES_SERVICE_HOST and KUBERNETES_SERVICE_PORT"
	host=${KUBERNETES_SERVICE_HOST:-}
	case $host in *:*) host="[$host]" ;; esac
	endpoints=$host:${KUBERNETES_SERVICE_PORT:-}
	[ "$endpoints" != : ] || fail "neither API_ENDPOINTS nor $variable are set"
fi
for endpoint in $endpoints; do
	port=${endpoint##*:}
	address=${endpoint%:*}
	case $address in
	\[*:*\]) address=${address#\[} address=${address%\]} ;;
	*:* | \[*) address= ;; # IPv6 without brackets, or brackets around something else
	esac
	if ! kind=$(family "$address") || ! is_number "$port" 1 65535; then
		fail "$variable: '$endpoint' must be ADDRESS:PORT or [ADDRESS6]:PORT, and no name"
	fi
	accept "$kind daddr $address tcp dport $port"
done
[ -n "$accepts" ] || fail "API_ENDPOINTS names no endpoint"

case ${ALLOW_DNS:-false} in
false) ;;
true)
	before=$accepts
	while read -r keyword server _ || [ -n "$keyword" ]; do
		[ "$keyword" = nameserver ] || continue
		kind=$(family "$server") || fail "ALLOW_DNS is true and resolv.conf's name server '$server' is no address"
		accept "$kind daddr $server udp dport 53"
		accept "$kind daddr $server tcp dport 53"
	done </etc/resolv.conf
	[ "$accepts" != "$before" ] || fail "ALLOW_DNS is true and resolv.conf names no name server"
	;;
*) fail "ALLOW_DNS is '$ALLOW_DNS'; it must be true or false" ;;
esac

# What a user's socket sends is judged by where it goes, packet by packet, before connection tracking has a say: or
# whoever binds the port that the sidecar has just left would send on as "established". What has no user (`meta skuid`
# matches nothing) is the kernel's: the end of a connection that was closed, a refusal, neighbour discovery.
#
# What is not accepted is refused at once, and dropped should the refusal itself not work. Input is closed so that
# nobody outside can open the connection that the runner may not; forward, because a pod is no router, and inherits
# the node's ip_forward.
#
# One transaction: a container that is started again replaces the table, and there is no moment without one.
rules="
add table inet $TABLE
delete table inet $TABLE
table inet $TABLE {
	chain refuse {
		meta l4proto tcp reject with tcp reset
		reject with icmpx admin-prohibited
	}
	chain output {
		type filter hook output priority filter; policy drop;
		oifname \"lo\" accept$accepts
		meta skuid <= $MAX_UID goto refuse
		ct state established,related accept
		icmpv6 type { nd-router-solicit, nd-neighbor-solicit, nd-neighbor-advert } accept
		goto refuse
	}
	chain input {
		type filter hook input priority filter; policy drop;
		iifname \"lo\" accept
		ct state established,related accept
		icmpv6 type { nd-router-advert, nd-neighbor-solicit, nd-neighbor-advert } accept
		goto refuse
	}
	chain forward {
		type filter hook forward priority filter; policy drop;
	}
}"
complaint=$(echo "$rules" | nft -f - 2>&1) ||
	fail "the rules were not loaded (is NET_ADMIN granted, has the kernel nf_tables?): $(echo "$complaint" | head -n 1)"

# Three chains that drop, and as many rules that accept and that refuse as were asked for, no more and no fewer.
listed=$(nft -n list table inet $TABLE) || fail "the rules were loaded and cannot be listed"
count() { # TEXT PATTERN
	echo "$1" | grep -c -e "$2" || true
}
for pattern in 'hook output .*policy drop;' 'hook input .*policy drop;' 'hook forward .*policy drop;' \
	"skuid $uid .*accept\$" 'accept$' 'goto refuse$'; do
	wanted=$(count "$rules" "$pattern")
	found=$(count "$listed" "$pattern")
	[ "$found" = "$wanted" ] || fail "the rules were loaded and listed back $found of $wanted times '$pattern'"
done
echo "$listed"
