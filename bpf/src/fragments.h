/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0 */
/* Later fragments have no ports: they take the verdict of their datagram's first fragment. */

#define LIFE_FRAGMENT 30	/* seconds, the time that reassembly waits */

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

/* The verdict of a first fragment. A datagram with two of them is denied if either is: returns the tied verdict. */
static __always_inline int frag_remember(const struct packet *p, __u32 rule, int pass)
{
	struct frag_entry entry = { .rule = rule, .pass_ = pass };
	struct frag_key key;

	frag_key_of(&key, p);
	if (frag_alive(map_find(fragments_denied, &key)))
		return 0;
	entry.expires = bpf_jiffies64() + LIFE_FRAGMENT * HZ;
	if (pass)
		map_put(fragments, &key, &entry);
	else
		map_put(fragments_denied, &key, &entry);
	return pass;
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
