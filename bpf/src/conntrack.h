/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0 */
/* Connections, seen from this host: local and remote end, and who opened it.
 *
 * Policy is asked first. An entry is made only where the answer will need it: for what leaves when ingress is enforced,
 * for what enters when egress is. So denied packets make no state, and a rule that goes away cuts its connections.
 */

struct flow {
	const __be32 *local, *remote;
	__be16 local_port, remote_port;
	__u8 family, proto;
};

#define LIFE_HALF_OPEN 60	/* seconds */
#define LIFE_ESTABLISHED 8000
#define LIFE_CLOSING 10
#define LIFE_RESET 60		/* a reset may be forged: what is alive has time to show it */
#define LIFE_ANSWERED 180	/* UDP and all others */

static __always_inline void ct4_key_of(struct ct4_key *key, const struct flow *f, __u8 origin)
{
	*key = (struct ct4_key){
		.local_be = f->local[0], .remote_be = f->remote[0], .local_port_be = f->local_port,
		.remote_port_be = f->remote_port, .proto = f->proto, .origin = origin,
	};
}

static __always_inline void ct6_key_of(struct ct6_key *key, const struct flow *f, __u8 origin)
{
	__builtin_memcpy(key->local, f->local, 16);
	__builtin_memcpy(key->remote, f->remote, 16);
	key->local_port_be = f->local_port;
	key->remote_port_be = f->remote_port;
	key->proto = f->proto;
	key->origin = origin;
	key->pad = 0;
}

static __always_inline int is_alive(const struct ct_entry *entry)
{
	return entry && (__s64)(entry->expires - bpf_jiffies64()) >= 0;
}

/* Is there such a connection? */
static __always_inline int flow_known(const struct flow *f, __u8 origin)
{
	if (f->family == 4) {
		struct ct4_key key;

		ct4_key_of(&key, f, origin);
		return is_alive(map_find(ct4, &key)) || is_alive(map_find(ct4_new, &key));
	} else {
		struct ct6_key key;

		ct6_key_of(&key, f, origin);
		return is_alive(map_find(ct6, &key)) || is_alive(map_find(ct6_new, &key));
	}
}

static __always_inline void flow_add(const struct flow *f, __u8 origin, __u32 rule)
{
	struct ct_entry entry = { .created = bpf_jiffies64(), .rule = rule };

	entry.expires = entry.created + (__u64)LIFE_HALF_OPEN * HZ;
	if (f->family == 4) {
		struct ct4_key key;

		ct4_key_of(&key, f, origin);
		map_put(ct4_new, &key, &entry);
	} else {
		struct ct6_key key;

		ct6_key_of(&key, f, origin);
		map_put(ct6_new, &key, &entry);
	}
}

static __always_inline __u32 life_s(__u32 flags, __u8 proto, int young)
{
	if (!(flags & CT_SEEN_REPLY))
		return flags & CT_RESET ? LIFE_CLOSING : LIFE_HALF_OPEN;
	if (proto != PROTO_TCP && proto != PROTO_SCTP)
		return LIFE_ANSWERED;
	if (young)	/* our answer to a forged source looks like this */
		return LIFE_HALF_OPEN;
	if (proto == PROTO_SCTP)
		return LIFE_ESTABLISHED;
	if ((flags & (CT_FIN_LOCAL | CT_FIN_REMOTE)) == (CT_FIN_LOCAL | CT_FIN_REMOTE))
		return LIFE_CLOSING;
	return flags & CT_RESET ? LIFE_RESET : LIFE_ESTABLISHED;
}

/* A packet of a known connection. Writes only when something changes: a state, or the expiry by a good part of it.
 * 1: @young no more. The side that opened it has answered an answer, so it is no forged source.
 */
static __always_inline int
flow_seen(struct ct_entry *entry, const struct packet *p, const struct scope *s, int reply, int young)
{
	__u32 flags = entry->flags;
	__u64 expires, step;
	int proven;

	if (p->proto == PROTO_TCP) {
		if (p->tcp_flags & TCP_RST)
			flags |= CT_RESET;
		else
			flags &= ~CT_RESET;
		if (p->tcp_flags & TCP_FIN)
			flags |= s->direction == EGRESS ? CT_FIN_LOCAL : CT_FIN_REMOTE;
		if (!reply && (p->tcp_flags & (TCP_SYN | TCP_ACK)) == TCP_SYN)
			flags = 0;	/* the same ports again */
	}
	if (reply && !(p->tcp_flags & TCP_RST))
		flags |= CT_SEEN_REPLY;
	proven = young && !reply && flags & CT_SEEN_REPLY && !(flags & CT_RESET);
	step = (__u64)life_s(flags, p->proto, young && !proven) * HZ;
	expires = bpf_jiffies64() + step;
	if (flags != entry->flags || proven) {
		entry->flags = flags;
		entry->expires = expires;
	} else if (expires - entry->expires > step / 32) {
		entry->expires = expires;
	}
	return proven;
}

/* Is there such a connection? This packet belongs to it then, and may give it a place among those seen both ways.
 * What comes out is a number and no entry, lest the verifier walk the rest of the program once for each table.
 */
static __always_inline int
flow_touch(const struct flow *f, __u8 origin, const struct packet *p, const struct scope *s, int reply)
{
	struct ct_entry *entry, proven;

	if (p->dry)
		return flow_known(f, origin);
	if (f->family == 4) {
		struct ct4_key key;

		ct4_key_of(&key, f, origin);
		entry = map_find(ct4, &key);
		if (is_alive(entry)) {
			flow_seen(entry, p, s, reply, 0);
			return 1;
		}
		entry = map_find(ct4_new, &key);
		if (!is_alive(entry))
			return 0;
		if (flow_seen(entry, p, s, reply, 1)) {
			proven = *entry;
			map_put(ct4, &key, &proven);
			map_drop(ct4_new, &key);
		}
	} else {
		struct ct6_key key;

		ct6_key_of(&key, f, origin);
		entry = map_find(ct6, &key);
		if (is_alive(entry)) {
			flow_seen(entry, p, s, reply, 0);
			return 1;
		}
		entry = map_find(ct6_new, &key);
		if (!is_alive(entry))
			return 0;
		if (flow_seen(entry, p, s, reply, 1)) {
			proven = *entry;
			map_put(ct6, &key, &proven);
			map_drop(ct6_new, &key);
		}
	}
	return 1;
}

static __always_inline void flow_of(struct flow *f, const struct packet *p, __u32 direction)
{
	f->family = p->family;
	f->proto = p->proto;
	if (direction == INGRESS) {
		f->local = p->dst;
		f->remote = p->src;
		f->local_port = p->dport;
		f->remote_port = p->sport;
	} else {
		f->local = p->src;
		f->remote = p->dst;
		f->local_port = p->sport;
		f->remote_port = p->dport;
	}
	if (p->proto == PROTO_ICMP4 || p->proto == PROTO_ICMP6) {
		f->local_port = p->sport;	/* the echo identifier, whoever asks */
		f->remote_port = 0;
	}
}

static __always_inline int is_icmp(const struct packet *p)
{
	return p->class == CLASS_ICMP4 || p->class == CLASS_ICMP6 ||
	       (p->class == CLASS_FRAG_FIRST && p->proto == (p->family == 4 ? PROTO_ICMP4 : PROTO_ICMP6));
}

static __always_inline int is_echo_request(const struct packet *p)
{
	return is_icmp(p) && p->icmp_type == (p->family == 4 ? 8 : 128);
}

static __always_inline int is_echo_reply(const struct packet *p)
{
	return is_icmp(p) && p->icmp_type == (p->family == 4 ? 0 : 129);
}

static __always_inline int is_tcp_open(const struct packet *p)
{
	return p->proto == PROTO_TCP && (p->tcp_flags & (TCP_SYN | TCP_ACK)) == TCP_SYN;
}

/* Is this packet, which policy would drop, an answer to the other side's opening? */
static __always_inline int is_reply(const struct packet *p, const struct scope *s)
{
	struct flow f;

	if (is_tcp_open(p) || p->class == CLASS_FRAG_NONFIRST || (is_icmp(p) && !is_echo_reply(p)))
		return 0;
	flow_of(&f, p, s->direction);
	return flow_touch(&f, s->direction == INGRESS ? CT_ORIGIN_OUT : CT_ORIGIN_IN, p, s, 1);
}

/* Port index of the packet that would travel the other way. */
static __always_inline __u32 reverse_index(const struct packet *p)
{
	if (p->proto == PROTO_UDP)
		return PORTS_UDP + be16(p->sport);
	if (p->proto == PROTO_SCTP)
		return PORTS_SCTP + be16(p->sport);
	return PORTS_PROTOCOL + p->proto;
}

/* Can this packet be the first of a connection, and will its answers need an entry?
 *
 * TCP: only the SYN, else the answer to an inbound connection would look like one of ours, and survive the rule that
 * let it in. ICMP: an echo request. Others: anything whose answers policy would not pass by itself.
 */
static __always_inline int needs_entry(const struct packet *p, const struct scope *s, __u32 slot)
{
	if (p->class == CLASS_FRAG_NONFIRST || p->class == CLASS_MALFORMED || !p->family || p->link)
		return 0;
	if (p->proto == PROTO_TCP)
		return is_tcp_open(p);
	if (is_icmp(p))
		return is_echo_request(p);
	return !allows(cell_of(s, !s->direction, slot, reverse_index(p)));
}

/* Keeps the entry of an allowed packet. 1: it is new (and @add makes it so). */
static __always_inline int flow_track(const struct packet *p, const struct scope *s, __u32 slot, __u32 rule, int add)
{
	__u8 origin = s->direction == INGRESS ? CT_ORIGIN_IN : CT_ORIGIN_OUT;
	struct flow f;

	if (p->class == CLASS_FRAG_NONFIRST || p->class == CLASS_MALFORMED || !p->family || p->link)
		return 0;
	if (is_icmp(p) && !is_echo_request(p))
		return 0;
	if (s->direction == INGRESS && !is_for_host(p, s->flags))
		return 0;
	flow_of(&f, p, s->direction);
	if (flow_touch(&f, origin, p, s, 0))
		return 0;
	if (!needs_entry(p, s, slot))
		return 0;
	if (p->proto != PROTO_TCP && flow_known(&f, !origin))
		return 0;	/* an answer: the other side opened it */
	if (add && !p->dry)
		flow_add(&f, origin, rule);
	return 1;
}

struct quote { __be32 src[4], dst[4]; __be16 sport, dport; __u8 proto, icmp_type; };

/* The packet that an ICMP error is about. 0, or 1 when it is not quoted up to its ports. */
static __always_inline int parse_quote(const struct packet *p, struct quote *q, void *data, void *end)
{
	__u64 off = p->l4_off + sizeof(struct icmp), limit = p->limit;
	struct ports *ports;
	struct ip4 *ip;
	struct ip6 *ip6;

	if (off > DEEPEST_HEADER)
		return 1;
	if (p->family == 4) {
		HEADER(ip, off, limit, 1);
		if (ip->version_ihl >> 4 != 4 || (ip->version_ihl & 15) < 5 || ip->frag & be16(0x1fff))
			return 1;
		q->src[0] = ip->src;
		q->dst[0] = ip->dst;
		q->proto = ip->proto;
		off += (ip->version_ihl & 15) * 4;
	} else {
		HEADER(ip6, off, limit, 1);
		if (ip6->version >> 4 != 6)
			return 1;
		__builtin_memcpy(q->src, ip6->src, 16);
		__builtin_memcpy(q->dst, ip6->dst, 16);
		q->proto = ip6->next;
		off += sizeof(*ip6);
	}
	if (q->proto == (p->family == 4 ? PROTO_ICMP4 : PROTO_ICMP6)) {
		struct icmp *icmp;

		HEADER(icmp, off, limit, 1);
		if (!is_echo(icmp->type, p->family))
			return 1;
		q->icmp_type = icmp->type;
		q->sport = icmp->id;
		q->dport = 0;
		return 0;
	}
	if (q->proto != PROTO_TCP && q->proto != PROTO_UDP && q->proto != PROTO_SCTP)
		return 1;
	HEADER(ports, off, limit, 1);
	q->sport = ports->src;
	q->dport = ports->dst;
	return 0;
}

static __always_inline int is_icmp_error(const struct packet *p)
{
	if (p->class == CLASS_ICMP4)
		return p->icmp_type == 3 || p->icmp_type == 11 || p->icmp_type == 12;
	return p->class == CLASS_ICMP6 && p->icmp_type >= 1 && p->icmp_type <= 4;
}

/* "The packet is too big": without it, connections hang. */
static __always_inline int is_mtu_error(const struct packet *p)
{
	return (p->class == CLASS_ICMP4 && p->icmp_type == 3 && p->icmp_code == 4) ||
	       (p->class == CLASS_ICMP6 && p->icmp_type == 2);
}

static __always_inline int same_address(const __be32 *a, const __be32 *b)
{
	return a[0] == b[0] && a[1] == b[1] && a[2] == b[2] && a[3] == b[3];
}

/* Is this ICMP error about a connection of this host? Incoming, it must quote what the host sent, from the address that
 * the error went to. An error stands in for an answer: where answers pass by policy alone, connections have no entry, and
 * the error passes as the answer would. TCP keeps entries for what we open, so there this holds for "too big" only.
 */
static __always_inline int is_related(const struct packet *p, const struct scope *s, void *data, void *end)
{
	struct quote q = {};
	struct flow f;
	__u32 index;

	if (!is_icmp_error(p) || parse_quote(p, &q, data, end))
		return 0;
	f.family = p->family;
	f.proto = q.proto;
	if (s->direction == INGRESS) {
		if (!same_address(q.src, p->dst))
			return 0;
		f.local = q.src;
		f.remote = q.dst;
		f.local_port = q.sport;
		f.remote_port = q.dport;
	} else {
		if (!same_address(q.dst, p->src) && !is_mtu_error(p))
			return 0;
		f.local = q.dst;
		f.remote = q.src;
		f.local_port = q.proto == PROTO_ICMP4 || q.proto == PROTO_ICMP6 ? q.sport : q.dport;
		f.remote_port = q.proto == PROTO_ICMP4 || q.proto == PROTO_ICMP6 ? 0 : q.sport;
	}
	if (flow_known(&f, CT_ORIGIN_OUT) || flow_known(&f, CT_ORIGIN_IN))
		return 1;
	if (s->direction == EGRESS && is_mtu_error(p))
		return 1;
	if (q.proto != PROTO_UDP && q.proto != PROTO_SCTP && !(q.proto == PROTO_TCP && is_mtu_error(p)))
		return 0;
	index = q.proto == PROTO_TCP ? PORTS_TCP : q.proto == PROTO_UDP ? PORTS_UDP : PORTS_SCTP;
	return allows(cell_of(s, s->direction, slot_of(p, f.remote, s->flags), index + be16(q.sport)));
}
