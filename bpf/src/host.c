/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0 */
/* The life of a packet: read the configuration once, parse, judge, keep state, count, tell.
 *
 * TCX ingress and egress carry the whole policy. XDP is an accelerator in front of TCX ingress with the same verdicts:
 * what it passes carries a mark in front of the packet, so that it is not judged twice; what it leaves alone has none.
 */

/* A shorter first buffer is taken for the whole frame until the parser misses something: asking costs a call for each
 * small packet, and only cards that split headers from data have several buffers there. Those frames are TCX's.
 */
#define FIRST_BUFFER 1024

#define UNASKED (CELL_ALLOW << 28 | RULE_DEFAULT_ALLOW)	/* the cell of a direction without policy */

/* Lives in a per-CPU map and not on the stack: see REFRESH. One for each hook, which cannot interrupt itself. */
struct scratch {
	union {
		struct {
			struct packet packet;
			struct outcome outcome;
		};
		__u8 opaque[sizeof(struct packet) + sizeof(struct outcome) > 192 ? -1 : 192];
	};
	union {
		union answer answer;
		__u8 room[sizeof(union answer) > 192 ? -1 : 192];
	};
};

static __always_inline struct scratch *scratch_of(__u32 hook)
{
	struct scratch *scratch = map_find(scratch, &hook);

	if (scratch)
		__builtin_memset(scratch, 0, sizeof(struct packet) + sizeof(struct outcome));
	return scratch;
}

static __always_inline int refused_by_parser(const struct packet *p, const struct scope *s)
{
	if (p->malformed)
		return p->malformed;
	if (p->class == CLASS_NON_IP)
		return s->flags & CONFIG_DROP_NON_IP ? REASON_NON_IP_REFUSED : REASON_NON_IP;
	return impossible_address(p);
}

/* Packets that parse, from an address that can be: what policy and connections say. */
static __always_inline __u32
judge_by_policy(const struct packet *p, const struct scope *s, struct outcome *o, void *data, void *end)
{
	if (p->class != CLASS_FRAG_NONFIRST) {
		o->cell = cell_of(s, s->direction, o->slot, p->port_index);
		if (allows(o->cell)) {
			o->judged = 1;
			return REASON_FORWARDED;
		}
	}
	/* before the connections are asked: that is a hash look-up, which traffic of others shall not pay for */
	if (s->direction == INGRESS && !is_for_host(p, s->flags))
		return REASON_NOT_HOST;
	if (p->class == CLASS_FRAG_NONFIRST)
		return frag_follow(p);
	if (is_reply(p, s))
		return REASON_REPLY;
	if (is_related(p, s, data, end))
		return REASON_RELATED;
	o->judged = 1;
	return denial(o->cell);
}

static __always_inline void tie_fragments(const struct packet *p, const struct scope *s, struct outcome *o)
{
	int pass = o->reason < REASON_POLICY_DEFAULT || is_audited(s, o);
	__u32 tied = p->class == CLASS_FRAG_FIRST ? frag_remember(p, s, cell_rule(o->cell), pass) : 0;

	if (tied && pass) {
		o->reason = tied;
		o->judged = 0;
	}
}

static __always_inline void
judge_ingress(const struct packet *p, const struct scope *s, struct outcome *o, void *data, void *end, int may_add)
{
	__u32 refused = refused_by_parser(p, s);

	o->reason = REASON_LINK;
	if (p->class == CLASS_ARP)
		return;
	if (refused) {
		o->reason = refused;
		return;
	}
	o->slot = slot_of(p, p->src, s->flags);
	if (o->slot == SLOT_HOST) {
		o->reason = REASON_SPOOFED_LOCAL;
		return;
	}
	if (p->link)
		return;
	if (p->refuse)
		o->reason = is_for_host(p, s->flags) ? p->refuse : REASON_NOT_HOST;
	else
		o->reason = judge_by_policy(p, s, o, data, end);
	if (o->reason == REASON_NOT_HOST)
		return;
	tie_fragments(p, s, o);
	if (o->reason == REASON_FORWARDED && s->enforced & BUFFER_ENFORCE_EGRESS) {
		o->opens = flow_track(p, s, o->slot, cell_rule(o->cell), may_add);
		o->defer = o->opens && s->hook == HOOK_XDP;
	} else {
		o->opens = o->reason == REASON_FORWARDED && (is_tcp_open(p) || is_echo_request(p));
	}
}

static __always_inline void
judge_egress(const struct packet *p, const struct scope *s, struct outcome *o, void *data, void *end, int forwarded)
{
	int track = s->enforced & BUFFER_ENFORCE_INGRESS;

	if (forwarded) {
		/* masqueraded traffic of pods and machines leaves with our address; its answers come to us */
		o->reason = REASON_NOT_HOST;
		if (track && p->family && slot_of(p, p->src, s->flags) == SLOT_HOST)
			flow_track(p, s, slot_of(p, p->dst, s->flags), RULE_DEFAULT_ALLOW, 1);
		return;
	}
	o->reason = REASON_LINK;
	if (p->link)
		return;
	if (p->family)
		o->slot = slot_of(p, p->dst, s->flags);
	if (!(s->enforced & BUFFER_ENFORCE_EGRESS)) {
		o->reason = REASON_NOT_ENFORCED;
		o->cell = UNASKED;
	} else if (p->malformed) {
		o->reason = p->malformed;
		return;
	} else if (p->class == CLASS_NON_IP) {
		o->reason = REASON_NON_IP;
		return;
	} else {
		o->reason = judge_by_policy(p, s, o, data, end);
		tie_fragments(p, s, o);
	}
	if (track && (o->reason == REASON_FORWARDED || o->reason == REASON_NOT_ENFORCED))
		o->opens = flow_track(p, s, o->slot, cell_rule(o->cell), 1);
	else
		o->opens = o->reason == REASON_FORWARDED && (is_tcp_open(p) || is_echo_request(p));
}

/* What became of a traced packet goes to the one who sent it, and nowhere else. */
static __always_inline void
write_trace(const struct packet *p, const struct scope *s, const struct outcome *o, int drop, int audit)
{
	__u32 only = 0;
	struct trace *trace = map_find(trace, &only);

	if (!trace)
		return;
	fill_event(&trace->event, p, s, o, !drop ? EVENT_ALLOW : audit ? EVENT_AUDIT : EVENT_DROP, o->reason);
	trace->cell = o->cell;
	trace->slot = o->slot;
	trace->passes = !drop || audit;
	trace->audited = audit;
	trace->judged = o->judged;
	trace->opens = o->opens;
	trace->deferred = o->defer;
	trace->answered = wants_answer(p, s, o);
	trace->done = 1;
}

/* Counts and tells. 1: drop. */
static __always_inline int conclude(const struct packet *p, const struct scope *s, const struct outcome *o)
{
	int drop = o->reason >= REASON_POLICY_DEFAULT;
	int audit = drop && is_audited(s, o);

	if (p->dry) {
		write_trace(p, s, o, drop, audit);
		return drop && !audit;
	}

	count_reason(p, s, audit ? REASON_AUDITED : o->reason);
	if (o->judged) {
		__u32 rule = cell_rule(o->cell);

		count(map_find(rule_hits, &rule), p, s);
	}
	if (drop)
		emit(p, s, o, audit ? EVENT_AUDIT : EVENT_DROP, o->reason);
	else if ((o->opens && s->flags & CONFIG_LOG_ALLOWED) || (o->judged && cell_flags(o->cell) & CELLFLAG_LOG))
		emit(p, s, o, EVENT_ALLOW, o->reason);
	return drop && !audit;
}

/* Only a test run puts anything in front of a frame before we do, and only root knows the cookie. */
static __always_inline int is_traced_frame(struct xdp_md *ctx)
{
	__u64 *cookie = (void *)(long)ctx->data_meta;

	return (void *)(cookie + 1) <= (void *)(long)ctx->data && *cookie == CONFIG->trace_cookie;
}

static __always_inline int is_traced_skb(const struct __sk_buff *ctx)
{
	__u64 cookie = CONFIG->trace_cookie;

	return ctx->cb[0] == (__u32)cookie && ctx->cb[1] == (__u32)(cookie >> 32) && cookie;
}

int xdp(struct xdp_md *ctx)
{
	struct scope s = { .direction = INGRESS, .hook = HOOK_XDP, .segments = 1 };
	struct scratch *scratch;
	struct outcome *o;
	struct packet *p;
	__u64 *mark;

	read_config(&s);
	if (!(s.enforced & BUFFER_ENFORCE_INGRESS))
		return XDP_PASS;
	scratch = scratch_of(HOOK_XDP);
	if (!scratch)
		return XDP_PASS;
	p = &scratch->packet;
	o = &scratch->outcome;
	s.ifindex = ctx->ingress_ifindex;
	p->length = ctx->data_end - ctx->data;
	if (p->length >= FIRST_BUFFER)
		p->length = XDP_LENGTH(ctx);
	p->malformed = parse_frame(p, (void *)(long)ctx->data, (void *)(long)ctx->data_end, 0);
	if (p->malformed)
		p->class = CLASS_MALFORMED;
	REFRESH();
	if (p->malformed == NOT_LINEAR || (p->malformed && p->length != XDP_LENGTH(ctx)))
		return XDP_PASS;
	p->dry = is_traced_frame(ctx);
	judge_ingress(p, &s, o, (void *)(long)ctx->data, (void *)(long)ctx->data_end, 0);
	REFRESH();
	if (p->dry)
		return conclude(p, &s, o) ? XDP_DROP : XDP_PASS;
	if (o->defer || (wants_answer(p, &s, o) && may_answer(HOOK_XDP)))
		return XDP_PASS;
	if (o->reason < REASON_POLICY_DEFAULT) {
		if (bpf_xdp_adjust_meta(ctx, -(int)sizeof(*mark)))
			return XDP_PASS;
		mark = (void *)(long)ctx->data_meta;
		if ((void *)(mark + 1) > (void *)(long)ctx->data)
			return XDP_PASS;
		*mark = COOKIE ^ s.ifindex;
	}
	return conclude(p, &s, o) ? XDP_DROP : XDP_PASS;
}

static __always_inline int judged_by_xdp(struct __sk_buff *ctx)
{
	__u64 *mark = (void *)(long)ctx->data_meta;

	return (void *)(mark + 1) <= (void *)(long)ctx->data && *mark == (COOKIE ^ ctx->ifindex);
}

static __always_inline void parse_skb(struct __sk_buff *ctx, struct packet *p, const struct scope *s)
{
	void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;

	p->length = ctx->len;
	p->offload = ctx->gso_size != 0;
	if (s->bare) {
		p->ethertype = ctx->protocol;
		p->malformed = parse_packet(p, data, end);
	} else {
		p->malformed = parse_frame(p, data, end, ctx->vlan_present ? 1 : 0);
	}
	if (p->malformed)
		p->class = CLASS_MALFORMED;
}

static __always_inline int tcx(struct __sk_buff *ctx, __u32 direction, __u32 bare)
{
	struct scope s = {
		.direction = direction, .hook = direction == INGRESS ? HOOK_TCX_INGRESS : HOOK_TCX_EGRESS, .bare = bare,
	};
	int whole = 0;
	struct scratch *scratch;
	struct outcome *o;
	struct packet *p;

	/* the copy of a multicast that the host gets from itself has no link header */
	if (direction == INGRESS && (judged_by_xdp(ctx) || ctx->pkt_type == PACKET_LOOPBACK))
		return TCX_NEXT;
	if (direction == INGRESS && ctx->mark == ANSWER_MARK) {	/* what we tell a process of this host */
		ctx->mark = 0;
		return TCX_NEXT;
	}
	read_config(&s);
	s.ifindex = ctx->ifindex;
	s.segments = ctx->gso_segs ? ctx->gso_segs : 1;
	for (int attempt = 0; attempt < 2; attempt++) {
		scratch = scratch_of(s.hook);
		if (!scratch)
			return TCX_DROP;
		p = &scratch->packet;
		o = &scratch->outcome;
		p->dry = is_traced_skb(ctx);
		p->length = ctx->len;
		if (!s.enforced) {
			if (!p->dry)
				count_reason(p, &s, REASON_NOT_ENFORCED);
			return TCX_NEXT;
		}
		parse_skb(ctx, p, &s);
		REFRESH();
		if (p->malformed != NOT_LINEAR || whole)
			break;
		whole = 1;
		if (bpf_skb_pull_data(ctx, ctx->len < DEEPEST_HEADER ? ctx->len : DEEPEST_HEADER))
			break;
	}
	if (p->malformed == NOT_LINEAR)
		p->malformed = REASON_SHORT_L4;
	if (direction == EGRESS) {
		judge_egress(p, &s, o, (void *)(long)ctx->data, (void *)(long)ctx->data_end, ctx->ingress_ifindex != 0);
	} else if (s.enforced & BUFFER_ENFORCE_INGRESS) {
		judge_ingress(p, &s, o, (void *)(long)ctx->data, (void *)(long)ctx->data_end,
			      ctx->pkt_type != PACKET_OTHERHOST);
	} else {
		o->reason = REASON_NOT_ENFORCED;
		o->cell = UNASKED;
		if (p->family && ctx->pkt_type != PACKET_OTHERHOST) {
			o->slot = slot_of(p, p->src, s.flags);
			o->opens = flow_track(p, &s, o->slot, cell_rule(o->cell), 1);
		}
	}
	REFRESH();
	if (!conclude(p, &s, o))
		return TCX_NEXT;
	if (p->dry)
		return TCX_DROP;
	REFRESH();
	return wants_answer(p, &s, o) ? answer(ctx, p, &s, &scratch->answer) : TCX_DROP;
}

int tcx_ingress(struct __sk_buff *ctx)
{
	return tcx(ctx, INGRESS, 0);
}

int tcx_egress(struct __sk_buff *ctx)
{
	return tcx(ctx, EGRESS, 0);
}

/* For tunnels and other devices without link header. */
int tcx_ingress_l3(struct __sk_buff *ctx)
{
	return tcx(ctx, INGRESS, 1);
}

int tcx_egress_l3(struct __sk_buff *ctx)
{
	return tcx(ctx, EGRESS, 1);
}
