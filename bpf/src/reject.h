/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0 */
/* Answers instead of silence, where the cell that denies asks for them: TCP gets a reset, the rest an ICMP error.
 *
 * The denied packet itself becomes the answer and goes back through its device, on the way out into the stack of this
 * host. Only TCX answers: it knows whether a frame was for us. XDP leaves it as many packets as may be answered.
 * Whoever forges sources could make a host send to others what it never asked for; so answers have a budget on each
 * CPU and for each source, and beyond it there is silence.
 */

#define ANSWERS_PER_SOURCE 16	/* and second */
#define QUOTED 128		/* bytes of the denied packet in an ICMP error: its headers, whatever the options */
#define ADDRESSES_AT 12		/* of IPv4, whose pseudo header is them, the protocol and the length */
#define TTL 64

struct icmp_error { struct icmp icmp; __u8 quote[QUOTED]; };
struct answer4 { struct ip4 ip; union { struct tcp tcp; struct icmp_error error; }; };
struct answer6 { struct ip6 ip; union { struct tcp tcp; struct icmp_error error; }; };
union answer { struct answer4 four; struct answer6 six; };

static __always_inline int is_unicast(const __be32 *address, __u8 family)
{
	__u32 first = be32(address[0]) >> 24;

	if (family == 4)
		return first && first != 127 && first < 224;
	return first != 255 && (address[0] || address[1] || address[2] || address[3]);
}

/* Helpers take a length only when the verifier sees its bounds: the comparison must be of the very register. */
#define BOUNDED(length, least, most)					\
	({ asm volatile("" : "+r"(length)); (length) >= (least) && (length) <= (most); })

/* Is this a packet that may be answered at all? An error about an error, a broadcast or a forged source would spread. */
static __always_inline int is_answerable(const struct packet *p)
{
	if (p->group || !p->family || !is_unicast(p->src, p->family) || !is_unicast(p->dst, p->family))
		return 0;
	if (p->proto == PROTO_TCP)
		return p->class == CLASS_TCP && !(p->tcp_flags & TCP_RST);
	if (p->proto == PROTO_ICMP4 || p->proto == PROTO_ICMP6)
		return is_echo_request(p);
	return p->class != CLASS_FRAG_NONFIRST;
}

/* Denied by a cell that wants an answer? */
static __always_inline int wants_answer(const struct packet *p, const struct scope *s, const struct outcome *o)
{
	return o->reason >= REASON_POLICY_DEFAULT && o->judged && cell_flags(o->cell) & CELLFLAG_REJECT &&
	       !is_audited(s, o) && is_answerable(p);
}

static __always_inline int may_answer(__u32 hook)
{
	struct budget *budget = map_find(answers, &hook);

	return budget && within_budget(budget, CONFIG->reject_budget);
}

/* Has this source had its share of this second? Two CPUs may count at once and let one more by. */
static __always_inline int source_has_share(const struct packet *p)
{
	struct source_share fresh = { .window = bpf_jiffies64(), .used = 1 }, *share;
	struct source_key key = { .family = p->family };

	__builtin_memcpy(key.address, p->src, 16);
	share = map_find(answer_sources, &key);
	if (!share || fresh.window - share->window >= HZ) {
		map_put(answer_sources, &key, &fresh);
		return 1;
	}
	if (share->used >= ANSWERS_PER_SOURCE)
		return 0;
	share->used++;
	return 1;
}

/* The internet checksum of @bytes (a multiple of four) that begins with @sum. */
static __always_inline __sum16 checksum(void *from, __u64 bytes, __u32 sum)
{
	__u64 total = (__u32)bpf_csum_diff(NULL, 0, from, bytes, sum);

	total = (total & 0xffff) + (total >> 16);
	total = (total & 0xffff) + (total >> 16);
	return ~(total + (total >> 16));
}

/* What refuses the segment @seen and @length bytes of sequence space. */
static __always_inline void fill_reset(struct tcp *out, const struct tcp *seen, __u32 length)
{
	__builtin_memset(out, 0, sizeof(*out));
	out->src = seen->dst;
	out->dst = seen->src;
	out->doff = sizeof(*out) / 4 << 4;
	out->flags = TCP_RST;
	if (seen->flags & TCP_ACK) {
		out->seq = seen->ack;
	} else {
		out->flags |= TCP_ACK;
		out->ack = be32(be32(seen->seq) + length);
	}
}

/* Fills the transport part of an answer; returns its length, or 0 when it is to be silence. */
static __always_inline __u64
fill_transport(struct __sk_buff *ctx, struct packet *p, struct tcp *reset, struct icmp_error *error)
{
	__u64 quoted = p->limit - p->l3_off;
	struct tcp seen;

	if (p->proto == PROTO_TCP) {
		if (bpf_skb_load_bytes(ctx, p->l4_off, &seen, sizeof(seen)))
			return 0;
		fill_reset(reset, &seen, p->limit - p->l4_off - (seen.doff >> 4) * 4 + !!(seen.flags & TCP_SYN) +
					 !!(seen.flags & TCP_FIN));
		return sizeof(*reset);
	}
	quoted = quoted < QUOTED ? quoted & ~3ull : QUOTED;
	if (!BOUNDED(quoted, 4, QUOTED) || bpf_skb_load_bytes(ctx, p->l3_off, error->quote, quoted))
		return 0;
	__builtin_memset(&error->icmp, 0, sizeof(error->icmp));
	error->icmp.type = p->family == 4 ? 3 : 1;
	error->icmp.code = p->family == 4 ? 13 : 1;	/* administratively prohibited */
	return sizeof(error->icmp) + quoted;
}

/* Both return the length of the whole answer, from layer 3 on, or 0. */
static __always_inline __u64 fill_answer4(struct __sk_buff *ctx, struct packet *p, struct answer4 *out)
{
	__u64 length = fill_transport(ctx, p, &out->tcp, &out->error);
	int tcp = p->proto == PROTO_TCP;

	if (!BOUNDED(length, sizeof(struct icmp), sizeof(struct icmp_error)))
		return 0;
	__builtin_memset(&out->ip, 0, sizeof(out->ip));
	out->ip.version_ihl = 0x45;
	out->ip.total = be16(sizeof(out->ip) + length);
	out->ip.frag = be16(0x4000);
	out->ip.ttl = TTL;
	out->ip.proto = tcp ? PROTO_TCP : PROTO_ICMP4;
	out->ip.src = p->dst[0];
	out->ip.dst = p->src[0];
	out->ip.check = checksum(&out->ip, sizeof(out->ip), 0);
	if (tcp) {
		__u32 pseudo = bpf_csum_diff(NULL, 0, (void *)&out->ip + ADDRESSES_AT, 8, be32(PROTO_TCP) + be32((__u32)length));

		out->tcp.check = checksum(&out->tcp, sizeof(out->tcp), pseudo);
	} else {
		out->error.icmp.check = checksum(&out->error, length, 0);
	}
	return sizeof(out->ip) + length;
}

static __always_inline __u64 fill_answer6(struct __sk_buff *ctx, struct packet *p, struct answer6 *out)
{
	__u64 length = fill_transport(ctx, p, &out->tcp, &out->error);
	int tcp = p->proto == PROTO_TCP;
	__u32 pseudo;

	if (!BOUNDED(length, sizeof(struct icmp), sizeof(struct icmp_error)))
		return 0;
	__builtin_memset(&out->ip, 0, sizeof(out->ip));
	out->ip.version = 0x60;
	out->ip.length = be16(length);
	out->ip.next = tcp ? PROTO_TCP : PROTO_ICMP6;
	out->ip.hop_limit = TTL;
	__builtin_memcpy(out->ip.src, p->dst, 16);
	__builtin_memcpy(out->ip.dst, p->src, 16);
	pseudo = bpf_csum_diff(NULL, 0, (void *)&out->ip.src, 32, be32(out->ip.next) + be32((__u32)length));
	if (tcp)
		out->tcp.check = checksum(&out->tcp, sizeof(out->tcp), pseudo);
	else
		out->error.icmp.check = checksum(&out->error, length, pseudo);
	return sizeof(out->ip) + length;
}

static __always_inline int swap_macs(struct __sk_buff *ctx)
{
	__u8 seen[12], swapped[12];

	if (bpf_skb_load_bytes(ctx, 0, seen, sizeof(seen)))
		return -1;
	__builtin_memcpy(swapped, seen + 6, 6);
	__builtin_memcpy(swapped + 6, seen, 6);
	return bpf_skb_store_bytes(ctx, 0, swapped, sizeof(swapped), 0);
}

/* Turns the denied packet around. What the program returns: TCX_REDIRECT, or TCX_DROP for silence. */
static __always_inline int answer(struct __sk_buff *ctx, struct packet *p, struct scope *s, union answer *out)
{
	__u32 direction = s->direction;
	__u64 length;

	if (direction == INGRESS && (ctx->pkt_type != PACKET_HOST || !source_has_share(p)))
		return TCX_DROP;
	if (!may_answer(s->hook))
		return TCX_DROP;
	length = p->family == 4 ? fill_answer4(ctx, p, &out->four) : fill_answer6(ctx, p, &out->six);
	if (!BOUNDED(length, sizeof(struct ip4), sizeof(*out)))
		return TCX_DROP;
	if (bpf_skb_change_tail(ctx, p->l3_off + length, 0) ||
	    bpf_skb_store_bytes(ctx, p->l3_off, out, length, BPF_F_INVALIDATE_HASH) || (!s->bare && swap_macs(ctx)))
		return TCX_DROP;
	count(map_find(answered, &direction), p, s);
	if (direction == INGRESS)
		return bpf_redirect(s->ifindex, 0);
	ctx->mark = ANSWER_MARK;
	return bpf_redirect(s->ifindex, BPF_F_INGRESS);
}
