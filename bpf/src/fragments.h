/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0 */
/* Later fragments have no ports: they take the verdict of their datagram's first fragment. */

#define LIFE_FRAGMENT 10	/* seconds: reassembly waits longer, but what is so late was lost; and shares renew sooner */

static __always_inline void frag_key_of(struct frag_key *key, const struct packet *p)
{
	__builtin_memcpy(key->src, p->src, 16);
	__builtin_memcpy(key->dst, p->dst, 16);
	key->id = p->frag_id;
	key->proto = p->frag_proto;
	key->family = p->family;
	key->pad = 0;
}

static __always_inline int frag_alive(const struct frag_entry *entry)
{
	return entry && (__s64)(entry->expires - bpf_jiffies64()) >= 0;
}

/* May this source have one more datagram in the table? One sender must not push out those of all others. */
static __always_inline int frag_share(const struct packet *p)
{
	struct source_share fresh = { .window = bpf_jiffies64(), .used = 1 }, *share;
	struct source_key key = { .family = p->family };

	__builtin_memcpy(key.address, p->src, 16);
	share = map_find(frag_sources, &key);
	if (!share || fresh.window - share->window >= LIFE_FRAGMENT * HZ) {
		if (!p->dry)
			map_put(frag_sources, &key, &fresh);
		return 1;
	}
	if (share->used >= FRAGMENTS / 16)
		return 0;
	if (!p->dry)
		share->used++;
	return 1;
}

/* Keeps the verdict of a first fragment. A datagram with two of them is denied if either is. 0, or why it is dropped
 * though it would pass.
 */
static __always_inline __u32 frag_remember(const struct packet *p, const struct scope *s, __u32 rule, int pass)
{
	struct frag_entry entry = { .rule = rule, .pass_ = pass };
	struct frag_key key;

	frag_key_of(&key, p);
	if (frag_alive(map_find(fragments_denied, &key)))
		return REASON_FRAG_DENIED;
	/* what this host sends is no flood from outside */
	if (pass && s->direction == INGRESS && !frag_alive(map_find(fragments, &key)) && !frag_share(p))
		return REASON_FRAG_TABLE_FULL;
	if (p->dry)
		return 0;
	entry.expires = bpf_jiffies64() + LIFE_FRAGMENT * HZ;
	if (pass)
		map_put(fragments, &key, &entry);
	else
		map_put(fragments_denied, &key, &entry);
	return 0;
}

/* REASON_ for a later fragment, and the rule of its first. */
static __always_inline __u32 frag_follow(const struct packet *p)
{
	struct frag_key key;

	frag_key_of(&key, p);
	if (frag_alive(map_find(fragments_denied, &key)))
		return REASON_FRAG_DENIED;
	return frag_alive(map_find(fragments, &key)) ? REASON_FORWARDED : REASON_FRAG_NO_FIRST;
}
