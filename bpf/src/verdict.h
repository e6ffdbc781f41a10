/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0 */
/* From a slot and a port to a cell of the policy: three array loads, whatever the number of rules. */

#define TCX_NEXT (-1)	/* other programs, and the stack, still have their say */
#define TCX_DROP 2
#define TCX_REDIRECT 7
#define PACKET_HOST 0
#define PACKET_OTHERHOST 3
#define PACKET_LOOPBACK 5

#define cell_verdict(cell) ((cell) >> 28)
#define cell_flags(cell) ((cell) >> 24 & 15)
#define cell_rule(cell) ((cell) & 0xffffff)

struct outcome {
	__u32 reason;	/* REASON_: what is done and counted */
	__u32 cell;	/* valid when judged */
	__u32 slot;	/* of the remote address */
	__u8 judged;	/* the cell decided: its rule is counted */
	__u8 opens;	/* first packet of a connection */
	__u8 defer;	/* XDP only: leave it to the next hook, which keeps the state */
};

/* Zero, which denies, where a table has no entry: reached only when user space wrote an index that does not exist. */
static __always_inline __u32 cell_of(const struct scope *s, __u32 direction, __u32 slot, __u32 port_index)
{
	__u32 at = s->buffer * SLOTS + slot;
	__u32 block = (s->buffer * 2 + direction) * PORT_BLOCKS + port_index / PORT_BLOCK;
	struct rows *rows = map_find(class_of, &at);
	struct port_columns *columns = map_find(port_class, &block);
	struct cell_block *cells;

	if (slot >= SLOTS || !rows || !columns)
		return 0;
	at = direction == INGRESS ? rows->ingress_at : rows->egress_at;
	at += columns->column[port_index % PORT_BLOCK];
	block = at / CELL_BLOCK;
	cells = map_find(cells, &block);
	if (!cells)
		return 0;
	block = cells->cell[at % CELL_BLOCK];
	if (s->panic == PANIC_FAILSAFE && cell_rule(block) != RULE_FAILSAFE)
		return CELL_DEFAULT_DENY << 28 | direction;
	return block;
}

static __always_inline int allows(__u32 cell)
{
	return cell_verdict(cell) == CELL_ALLOW || cell_verdict(cell) == CELL_REDIRECT;
}

static __always_inline int is_audited(const struct scope *s, const struct outcome *o)
{
	return s->audit || (o->judged && cell_flags(o->cell) & CELLFLAG_AUDIT);
}

static __always_inline __u32 denial(__u32 cell)
{
	return cell_verdict(cell) == CELL_DENY ? REASON_POLICY_DENY : REASON_POLICY_DEFAULT;
}
