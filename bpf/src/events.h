/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0 */
/* What is counted and told. Verdicts never depend on it. */

static __always_inline void count(struct hits *hits, const struct packet *p, const struct scope *s)
{
	if (!hits)
		return;
	hits->packets += s->segments;	/* per CPU, so a plain addition */
	hits->bytes += p->length;
}

static __always_inline void count_reason(const struct packet *p, const struct scope *s, __u32 reason)
{
	__u32 at = s->direction * REASONS + reason;

	count(map_find(reasons, &at), p, s);
}

/* May there be one more in this second, on this CPU? */
static __always_inline int within_budget(struct budget *budget, __u32 most)
{
	__u64 now = bpf_jiffies64();

	if (now - budget->window >= HZ) {	/* a division would cost more than all else here */
		budget->window = now;
		budget->used = 0;
	}
	if (budget->used >= most) {
		budget->suppressed++;
		return 0;
	}
	budget->used++;
	return 1;
}

static __always_inline void
fill_event(struct event *e, const struct packet *p, const struct scope *s, const struct outcome *o, __u32 kind,
	   __u32 reason)
{
	__u32 at = o->slot;
	struct slot_info *slot = map_find(slot_info, &at);

	e->time_ns = bpf_ktime_get_ns();
	__builtin_memcpy(e->saddr, p->src, 16);
	__builtin_memcpy(e->daddr, p->dst, 16);
	e->sport_be = p->sport;
	e->dport_be = p->dport;
	e->kind = kind;
	e->reason = reason;
	e->direction = s->direction;
	e->hook = s->hook;
	e->family = p->family;
	e->proto = p->proto;
	e->tcp_flags = p->tcp_flags;
	e->icmp_type = p->icmp_type;
	e->icmp_code = p->icmp_code;
	e->verdict = cell_verdict(o->cell);
	e->ethertype_be = p->ethertype;
	e->identity = slot ? slot->identity : 0;
	e->rule = cell_rule(o->cell);
	e->ifindex = s->ifindex;
	e->length = p->length;
	e->generation = s->generation;
	e->packet_class = p->class;
	__builtin_memset(e->pad, 0, sizeof(e->pad));
}

static __always_inline void
emit(const struct packet *p, const struct scope *s, const struct outcome *o, __u32 kind, __u32 reason)
{
	struct budget *budget = map_find(budgets, &reason);
	struct event *e;

	if (!budget || !within_budget(budget, CONFIG->event_budget))
		return;
	e = bpf_ringbuf_reserve((void *)MAP(events), sizeof(*e), 0);
	if (!e) {
		budget->lost++;
		return;
	}
	fill_event(e, p, s, o, kind, reason);
	bpf_ringbuf_submit(e, 0);
}
