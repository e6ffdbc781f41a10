/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0 */
/* The structs of layout.py, written out for reading, and access to the maps.
 *
 * The maps exist before this is compiled: the loader creates or adopts them and hands over their descriptors as FD_<name>.
 * So the C does not know sizes, types or flags, and bcc's own table macros, which adopt a pinned map of any shape, are
 * not used.
 */

#define __always_inline inline __attribute__((always_inline))

struct config { __u32 generation, flags, buffer_flags0, buffer_flags1, event_budget, hz, panic, reject_budget; __u64 panic_until, trace_cookie; };
struct peer { __u32 slot, flags; };
struct rows { __u32 ingress_at, egress_at; };
struct slot_info { __u32 identity, flags; };
struct ip4_block { __u32 entry[BLOCK_ENTRIES]; };
struct port_columns { __u16 column[PORT_BLOCK]; };
struct cell_block { __u32 cell[CELL_BLOCK]; };
struct ip4_key { __be32 address_be; };
struct ip6_key { __be32 address[4]; };
struct net6_key { __be32 network[2]; };
struct prefix6_key { __u32 length; __be32 address[4]; };
struct ct4_key { __be32 local_be, remote_be; __be16 local_port_be, remote_port_be; __u8 proto, origin; __u16 pad; };
struct ct6_key { __be32 local[4], remote[4]; __be16 local_port_be, remote_port_be; __u8 proto, origin; __u16 pad; };
struct ct_entry { __u64 expires, created; __u32 rule, flags; };
struct frag_key { __be32 src[4], dst[4]; __u32 id; __u8 proto, family; __u16 pad; };
struct frag_entry { __u64 expires; __u32 rule, pass_; };
struct hits { __u64 packets, bytes; };
struct budget { __u64 window, used, suppressed, lost; };
struct source_key { __be32 address[4]; __u8 family, pad[3]; };
struct source_share { __u64 window, used; };
struct event {
	__u64 time_ns;
	__be32 saddr[4], daddr[4];
	__be16 sport_be, dport_be;
	__u8 kind, reason, direction, hook, family, proto, tcp_flags, icmp_type, icmp_code, verdict;
	__be16 ethertype_be;
	__u32 identity, rule, ifindex, length, generation;
	__u8 packet_class, pad[3];
};
struct trace { struct event event; __u32 cell, slot; __u8 passes, audited, judged, opens, deferred, answered, done, pad; };

#define MAP(name) bpf_pseudo_fd(1, FD_##name)
#define map_find(name, key) bpf_map_lookup_elem_(MAP(name), key)
#define map_put(name, key, value) bpf_map_update_elem_(MAP(name), key, value, 0)
#define map_drop(name, key) bpf_map_delete_elem_(MAP(name), key)

/* The address of the only entry, put into the instructions by the verifier: no look-up. */
#define CONFIG ((struct config *)bpf_pseudo_fd(2, FD_config))

/* Releases of bcc before the kernel's 5.18 do not declare it. */
static __u64 (*xdp_buff_len)(struct xdp_md *ctx) = (void *)188;

#define INGRESS 0
#define EGRESS 1

/* What holds for one packet from its first to its last instruction: read once, so that a flip of the generation in
 * between cannot mix two policies.
 */
struct scope {
	__u32 generation, buffer, flags, enforced, audit, panic;
	__u32 direction, hook, ifindex, segments;
	__u32 bare;	/* frames of this device begin with layer 3 */
};

/* Somebody wants out at once: nothing is enforced, or everything and the fail-safe list alone passes. */
static __always_inline void read_panic(struct scope *s, __u64 until)
{
	if (until && (__s64)(until - bpf_jiffies64()) <= 0) {
		s->panic = PANIC_NONE;
		return;
	}
	s->enforced = s->panic == PANIC_OPEN ? 0 : BUFFER_ENFORCE_INGRESS | BUFFER_ENFORCE_EGRESS;
	s->audit = 0;
}

static __always_inline void read_config(struct scope *s)
{
	struct config *c = CONFIG;

	s->generation = *(volatile __u32 *)&c->generation;
	s->buffer = s->generation & 1;
	s->flags = c->flags;
	s->enforced = s->buffer ? c->buffer_flags1 : c->buffer_flags0;
	s->audit = s->enforced & BUFFER_AUDIT;
	s->enforced &= BUFFER_ENFORCE_INGRESS | BUFFER_ENFORCE_EGRESS;
	s->panic = c->panic;
	if (s->panic)
		read_panic(s, c->panic_until);
}
