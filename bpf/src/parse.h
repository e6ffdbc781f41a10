/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0 */
/* From the bytes of a frame to what policy is asked about.
 *
 * The parser is total: every frame ends in one class, and what cannot be parsed is a drop with a reason. Two bounds
 * apply to each header: @limit, where the packet says it ends, and @end, where the memory that we may read ends.
 * Reaching the second before the first is NOT_LINEAR: the caller pulls the bytes in (TCX) or leaves the frame to
 * the next hook (XDP).
 */

/* For the verifier, which follows every way through the parser with all the constants that it leaves in registers: what
 * one step tells the next goes through memory (struct packet lies in a map), and REFRESH makes the compiler forget what
 * it knows, so that the ways meet again after each step.
 */
#define REFRESH() asm volatile("" ::: "memory")

struct eth { __u8 dst[6], src[6]; __be16 type; } __attribute__((packed));
struct vlan_tag { __be16 tci, type; };
struct ip4 {
	__u8 version_ihl, tos;
	__be16 total, id, frag;
	__u8 ttl, proto;
	__sum16 check;
	__be32 src, dst;
};
struct ip6 {
	__u8 version, flow[3];
	__be16 length;
	__u8 next, hop_limit;
	__be32 src[4], dst[4];
};
struct ext6 { __u8 next, length; };
struct routing6 { __u8 next, length, type, left; };
struct frag6 { __u8 next, reserved; __be16 offset; __be32 id; };
struct ports { __be16 src, dst; };
struct tcp { __be16 src, dst; __be32 seq, ack; __u8 doff, flags; __be16 window; __sum16 check; __be16 urgent; };
struct udp { __be16 src, dst, length; __sum16 check; };
struct sctp { __be16 src, dst; __be32 tag, check; };
struct icmp { __u8 type, code; __sum16 check; __be16 id, seq; };

#define NOT_LINEAR 255		/* next to the REASON_ numbers */
#define DEEPEST_HEADER 0x3fff	/* bytes from the start of the frame */
#define EXT_HEADERS 8

#define PROTO_ICMP4 1
#define PROTO_IGMP 2
#define PROTO_TCP 6
#define PROTO_UDP 17
#define PROTO_ICMP6 58
#define PROTO_SCTP 132
#define EXT_HOP_BY_HOP 0
#define EXT_ROUTING 43
#define EXT_FRAGMENT 44
#define EXT_DESTINATION 60

#define TCP_FIN 1
#define TCP_SYN 2
#define TCP_RST 4
#define TCP_ACK 16

#define be16(x) ((__u16)__builtin_bswap16(x))
#define be32(x) ((__u32)__builtin_bswap32(x))

struct packet {
	__be32 src[4], dst[4];	/* IPv4: the first word, the rest is zero */
	__be16 sport, dport;	/* ICMP echo: the identifier in sport */
	__be16 ethertype;
	__u8 family;		/* 4, 6, or 0 */
	__u8 proto;		/* of a later fragment: what its first header is */
	__u8 frag_proto;	/* part of the key of a datagram */
	__u8 class;		/* CLASS_ */
	__u8 tcp_flags, icmp_type, icmp_code, hop_limit;
	__u8 group;		/* the frame is for a multicast or broadcast MAC address */
	__u8 link;		/* keeps the link alive: passes whatever policy says */
	__u8 fragmented;	/* has a fragment header, also that of an atomic fragment */
	__u8 dry;		/* a traced packet: no state, no counter, no event */
	__u8 offload;		/* a super-packet that the kernel merged or has still to split */
	__u32 malformed;	/* REASON_ of a frame that does not parse, or 0 */
	__u32 refuse;		/* REASON_ of a packet that parses but that nobody sends with good intent, or 0 */
	__u32 frag_id;
	__u32 port_index;	/* of port_class */
	__u32 length;		/* bytes of the frame */
	__u64 l3_off, l4_off, limit;	/* from the start of the frame; limit is where the packet ends */
	__u64 at;		/* of a walk over options */
};

/* @ptr = the header at @off; returns why there is none. */
#define HEADER(ptr, off, limit, reason)				\
	do {							\
		if ((off) + sizeof(*(ptr)) > (limit))		\
			return (reason);			\
		(ptr) = data + (off);				\
		if ((void *)((ptr) + 1) > end)			\
			return NOT_LINEAR;			\
	} while (0)

static __always_inline int is_echo(__u8 type, __u8 family)
{
	return family == 4 ? type == 8 || type == 0 : type == 128 || type == 129;
}

/* Checks what a fragment claims; @header is what reassembly adds in front of @bytes. */
static __always_inline int parse_fragment(struct packet *p, __u32 offset, int more, __u64 bytes, __u32 header)
{
	p->fragmented = 1;
	if (!offset && !more)
		return 0;	/* atomic: a whole packet */
	if (!bytes || (more && bytes & 7))
		return REASON_TINY_FRAG;
	if (offset + bytes + header > 65535)
		return REASON_FRAG_TOOBIG;
	if (!offset) {
		p->class = CLASS_FRAG_FIRST;
		return 0;
	}
	/* would replace ports or flags that were judged with the first fragment */
	if ((p->frag_proto == PROTO_TCP && offset < 20) || (p->frag_proto == PROTO_SCTP && offset < 12))
		return REASON_FRAG_L4_OVERLAP;
	p->class = CLASS_FRAG_NONFIRST;
	return 0;
}

static __always_inline int parse_tcp(struct packet *p, void *data, void *end, __u64 off, __u64 limit, int reason)
{
	struct tcp *tcp;
	__u8 flags;

	HEADER(tcp, off, limit, reason);
	if ((tcp->doff >> 4) < 5 || (p->class != CLASS_FRAG_FIRST && (tcp->doff >> 4) * 4 > (p->limit - p->l4_off)))
		return REASON_BAD_DOFF;
	flags = tcp->flags & 0x3f;
	p->sport = tcp->src;
	p->dport = tcp->dst;
	p->tcp_flags = tcp->flags;
	p->port_index = PORTS_TCP + be16(tcp->dst);
	if (!flags || (flags & TCP_SYN && flags & (TCP_FIN | TCP_RST)) || (flags & TCP_FIN && !(flags & TCP_ACK)))
		p->refuse = REASON_BAD_TCP_FLAGS;
	return 0;
}

static __always_inline int parse_udp(struct packet *p, void *data, void *end, __u64 off, __u64 limit, int reason)
{
	struct udp *udp;

	HEADER(udp, off, limit, reason);
	if (be16(udp->length) < 8 || (p->class != CLASS_FRAG_FIRST && be16(udp->length) > (p->limit - p->l4_off))) {
		/* a merged super-packet may carry the length of its first part, or none when that does not fit */
		if (!p->offload)
			return REASON_BAD_UDPLEN;
	}
	p->sport = udp->src;
	p->dport = udp->dst;
	p->port_index = PORTS_UDP + be16(udp->dst);
	return 0;
}

static __always_inline int parse_sctp(struct packet *p, void *data, void *end, __u64 off, __u64 limit, int reason)
{
	struct sctp *sctp;

	HEADER(sctp, off, limit, reason);
	p->sport = sctp->src;
	p->dport = sctp->dst;
	p->port_index = PORTS_SCTP + be16(sctp->dst);
	return 0;
}

/* Neighbour discovery and multicast listener messages never leave a link, so they are always seen with these marks;
 * RFC 6980: never in fragments either.
 */
static __always_inline void classify_icmp6(struct packet *p)
{
	__u8 type = p->icmp_type;

	if (type >= 133 && type <= 137) {
		__u32 least = type == 134 ? 16 : type >= 135 ? 24 : 8;

		p->class = CLASS_NDP;
		if (type == 137)
			p->refuse = REASON_ICMP_REDIRECT;
		else if (p->hop_limit != 255 || p->icmp_code || (p->limit - p->l4_off) < least || p->fragmented)
			p->refuse = REASON_NDP_INVALID;
		else
			p->link = 1;
	} else if ((type >= 130 && type <= 132) || type == 143) {
		p->class = CLASS_MLD;
		if (p->hop_limit != 1 || p->fragmented || (type != 143 && (p->limit - p->l4_off) < 24))
			p->refuse = REASON_NDP_INVALID;
		else
			p->link = 1;
	}
}

static __always_inline int parse_icmp(struct packet *p, void *data, void *end, __u64 off, __u64 limit, int reason)
{
	struct icmp *icmp;

	HEADER(icmp, off, limit, reason);
	p->icmp_type = icmp->type;
	p->icmp_code = icmp->code;
	if (is_echo(icmp->type, p->family))
		p->sport = icmp->id;
	p->port_index = (p->family == 4 ? PORTS_ICMP4 : PORTS_ICMP6) + icmp->type;
	if (p->family == 6)
		classify_icmp6(p);
	else if (icmp->type == 5)
		p->refuse = REASON_ICMP_REDIRECT;
	return 0;
}

static __always_inline int parse_l4(struct packet *p, void *data, void *end)
{
	int whole = p->class != CLASS_FRAG_FIRST, reason = whole ? REASON_SHORT_L4 : REASON_TINY_FRAG, class, result = 0;
	__u64 off = p->l4_off, limit = p->limit;

	if (off > DEEPEST_HEADER)
		return REASON_EXT_DEPTH;
	if (p->proto == PROTO_TCP) {
		class = CLASS_TCP;
		result = parse_tcp(p, data, end, off, limit, reason);
	} else if (p->proto == PROTO_UDP) {
		class = CLASS_UDP;
		result = parse_udp(p, data, end, off, limit, reason);
	} else if (p->proto == (p->family == 4 ? PROTO_ICMP4 : PROTO_ICMP6)) {
		class = p->family == 4 ? CLASS_ICMP4 : CLASS_ICMP6;
		result = parse_icmp(p, data, end, off, limit, reason);
	} else if (p->proto == PROTO_SCTP) {
		class = CLASS_SCTP;
		result = parse_sctp(p, data, end, off, limit, reason);
	} else {
		class = CLASS_OTHER_L4;
		p->port_index = PORTS_PROTOCOL + p->proto;
		if (whole && p->family == 4 && p->proto == PROTO_IGMP) {
			class = CLASS_IGMP;
			p->link = (p->dst[0] & be32(0xf0000000)) == be32(0xe0000000);
		}
	}
	if (!p->class)
		p->class = class;
	return result;
}

/* Do the IPv4 options name a route? @off is where they start. An option of length 0 is met again until the loop ends;
 * the stack refuses such a packet.
 */
static __always_inline int source_routed(struct packet *p, struct ip4 *ip, void *end)
{
	p->at = 0;
	for (int i = 0; i < 40; i++) {
		__u8 *option = (void *)(ip + 1);
		__u64 at;

		REFRESH();
		at = p->at;
		if (at >= (*(volatile __u8 *)&ip->version_ihl & 15) * 4 - sizeof(*ip))
			return 0;
		option += at & 63;
		if ((void *)(option + 1) > end || !option[0])
			return 0;
		if (option[0] == 131 || option[0] == 137)
			return 1;
		if ((void *)(option + 2) > end)
			return 0;
		p->at = at + (option[0] == 1 ? 1 : option[1]);
	}
	return 0;
}

static __always_inline int parse_ip4(struct packet *p, void *data, void *end)
{
	__u64 off = p->l3_off & 31, room = p->length - off;
	__u32 ihl, total, frag;
	struct ip4 *ip;
	int reason;

	HEADER(ip, off, p->length, REASON_SHORT_IP);
	ihl = (ip->version_ihl & 15) * 4;
	total = be16(ip->total);
	if (ip->version_ihl >> 4 != 4)
		return REASON_IP_VERSION;
	if (ihl < 20 || ihl > room)
		return REASON_BAD_IHL;
	if (!total && p->offload)	/* more than 64 KiB: the field cannot say */
		total = room;
	if (total < ihl || total > room)
		return REASON_BAD_TOTLEN;
	p->family = 4;
	p->src[0] = ip->src;
	p->dst[0] = ip->dst;
	p->proto = p->frag_proto = ip->proto;
	p->l4_off = off + ihl;
	p->limit = off + total;
	frag = be16(ip->frag);
	if (frag & 0x3fff) {
		p->frag_id = be16(ip->id);
		reason = parse_fragment(p, (frag & 0x1fff) * 8, frag & 0x2000, total - ihl, ihl);
		if (reason)
			return reason;
	}
	if (ihl > 20) {
		if (data + off + ihl > end)
			return NOT_LINEAR;
		if (source_routed(p, ip, end))
			p->refuse = REASON_SOURCE_ROUTE;
	}
	return 0;
}

static __always_inline int parse_frag6(struct packet *p, void *data, void *end, __u64 off, __u64 limit)
{
	struct frag6 *frag;

	if (p->fragmented)
		return REASON_DUP_FRAG_HEADER;
	HEADER(frag, off, limit, REASON_SHORT_EXT);
	p->l4_off = off + sizeof(*frag);
	p->frag_id = frag->id;
	p->proto = p->frag_proto = frag->next;
	return parse_fragment(p, be16(frag->offset) & 0xfff8, be16(frag->offset) & 1, limit - off - sizeof(*frag), 0);
}

/* One extension header at l4_off: moves l4_off and proto on. */
static __always_inline int parse_ext6(struct packet *p, void *data, void *end, int first)
{
	int reason = p->class == CLASS_FRAG_FIRST ? REASON_TINY_FRAG : REASON_SHORT_EXT;
	__u64 off = p->l4_off, limit = p->limit;
	struct routing6 *routing;
	struct ext6 *ext;

	if (off > DEEPEST_HEADER)
		return REASON_EXT_DEPTH;
	if (p->proto == EXT_FRAGMENT)
		return parse_frag6(p, data, end, off, limit);
	if (p->proto == EXT_HOP_BY_HOP && !first)
		return REASON_HBH_MISPLACED;
	if (p->proto == EXT_ROUTING) {
		HEADER(routing, off, limit, reason);
		if (!routing->type || routing->left)
			return REASON_ROUTING_HEADER;
	}
	HEADER(ext, off, limit, reason);
	off += (ext->length + 1) * 8;
	if (off > limit)
		return reason;
	p->proto = ext->next;
	p->l4_off = off;
	return 0;
}

static __always_inline int parse_ip6(struct packet *p, void *data, void *end)
{
	__u64 off = p->l3_off & 31;
	struct ip6 *ip;
	int reason;

	HEADER(ip, off, p->length, REASON_SHORT_IP);
	if (ip->version >> 4 != 6)
		return REASON_IP_VERSION;
	p->limit = off + sizeof(*ip) + be16(ip->length);
	if (!ip->length && p->offload)
		p->limit = p->length;
	else if (!ip->length && ip->next == EXT_HOP_BY_HOP)
		return REASON_JUMBOGRAM;
	if (p->limit > p->length)
		return REASON_BAD_PLEN;
	p->family = 6;
	__builtin_memcpy(p->src, ip->src, 16);
	__builtin_memcpy(p->dst, ip->dst, 16);
	p->hop_limit = ip->hop_limit;
	p->proto = ip->next;
	p->l4_off = off + sizeof(*ip);

	for (int i = 0; i <= EXT_HEADERS; i++) {
		REFRESH();
		if (p->proto != EXT_HOP_BY_HOP && p->proto != EXT_ROUTING && p->proto != EXT_FRAGMENT &&
		    p->proto != EXT_DESTINATION)
			break;
		if (i == EXT_HEADERS)
			return REASON_EXT_DEPTH;
		reason = parse_ext6(p, data, end, !i);
		if (reason)
			return reason;
		if (p->class == CLASS_FRAG_NONFIRST)
			break;
	}
	return 0;
}

/* Up to layer 3, from l3_off on, what ethertype says. */
static __always_inline int parse_packet(struct packet *p, void *data, void *end)
{
	int reason;

	REFRESH();
	if (p->ethertype == be16(0x0800)) {
		reason = parse_ip4(p, data, end);
	} else if (p->ethertype == be16(0x86dd)) {
		reason = parse_ip6(p, data, end);
	} else if (p->ethertype == be16(0x0806)) {
		p->class = CLASS_ARP;
		p->link = 1;
		return p->l3_off + 28 > p->length ? REASON_SHORT_IP : 0;
	} else {
		p->class = CLASS_NON_IP;
		return 0;
	}
	REFRESH();
	if (reason || p->class == CLASS_FRAG_NONFIRST)
		return reason;
	return parse_l4(p, data, end);
}

/* Fills @p, which the caller has zeroed but for length and offload. 0, a REASON_ or NOT_LINEAR.
 * @tags: VLAN tags that the device has taken off the frame.
 */
static __always_inline int parse_frame(struct packet *p, void *data, void *end, __u32 tags)
{
	__u64 off = sizeof(struct eth);
	struct vlan_tag *tag;
	struct eth *eth;

	HEADER(eth, 0, p->length, REASON_SHORT_ETH);
	p->ethertype = eth->type;
	p->group = eth->dst[0] & 1;
	for (int i = 0; i < 3; i++) {
		if (p->ethertype != be16(0x8100) && p->ethertype != be16(0x88a8))
			break;
		if (++tags > 2)
			return REASON_VLAN_DEPTH;
		HEADER(tag, off, p->length, REASON_SHORT_VLAN);
		p->ethertype = tag->type;
		off += sizeof(*tag);
	}
	p->l3_off = off;
	return parse_packet(p, data, end);
}

/* Addresses that no packet from the wire can have. */
static __always_inline int impossible_address(const struct packet *p)
{
	if (p->family == 4) {
		__u32 src = be32(p->src[0]), dst = be32(p->dst[0]);

		if (dst >> 24 == 127)
			return REASON_BAD_DST;
		if (!src && p->class == CLASS_UDP && dst == 0xffffffff && p->sport == be16(68) && p->dport == be16(67))
			return 0;	/* a DHCP client that has no address yet */
		if (!src && p->class == CLASS_IGMP)
			return 0;
		if (src >> 24 == 0 || src >> 24 == 127 || src >> 28 == 14 || src == 0xffffffff)
			return REASON_BAD_SRC;
	} else if (p->family == 6) {
		int low = !p->src[0] && !p->src[1];

		if ((p->src[0] & be32(0xff000000)) == be32(0xff000000))
			return REASON_BAD_SRC;
		if (low && p->src[2] == be32(0xffff))
			return REASON_BAD_SRC;
		if (low && !p->src[2] && p->src[3] == be32(1))
			return REASON_BAD_SRC;
		if (low && !p->src[2] && !p->src[3] && p->class != CLASS_NDP && p->class != CLASS_MLD)
			return REASON_BAD_SRC;
		if (!p->dst[0] && !p->dst[1] && !p->dst[2] && p->dst[3] == be32(1))
			return REASON_BAD_DST;
	}
	return 0;
}
