/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0 */
/* From an address to its slot. At most one hash look-up and three array loads for IPv4; no trie.  */

static __always_inline __u32 block_entry(__u32 block, __u32 byte)
{
	struct ip4_block *b = map_find(ip4_blocks, &block);

	return b ? b->entry[byte & 255] : SLOT_WORLD4;
}

static __always_inline __u32 slot_of4(__be32 address)
{
	__u32 host = be32(address);
	__u32 entry = block_entry(host >> 24, host >> 16);

	if (entry & ENTRY_HOSTS) {
		struct ip4_key key = { .address_be = address };
		struct peer *peer = map_find(ip4_hosts, &key);

		if (peer)
			return peer->slot;
	}
	if (entry & ENTRY_POINTER)
		entry = block_entry(entry & ENTRY_MASK, host >> 8);
	if (entry & ENTRY_POINTER)
		entry = block_entry(entry & ENTRY_MASK, host);
	return entry & ENTRY_MASK;
}

static __always_inline __u32 slot_of6(const __be32 *address, __u32 flags)
{
	struct prefix6_key key = { .length = 128 };
	struct peer *peer;

	__builtin_memcpy(key.address, address, 16);
	peer = map_find(ip6_hosts, key.address);
	if (!peer && flags & CONFIG_V6_NETS)
		peer = map_find(ip6_nets, key.address);	/* the key is the first eight bytes */
	if (!peer && flags & CONFIG_V6_TRIE)
		peer = map_find(ip6_prefixes, &key);
	return peer ? peer->slot : SLOT_WORLD6;
}

static __always_inline __u32 slot_of(const struct packet *p, const __be32 *address, __u32 flags)
{
	return p->family == 4 ? slot_of4(*address) : slot_of6(address, flags);
}

/* Is this packet, coming in, for the host itself? Frames to a group address are never forwarded by IP. */
static __always_inline int is_for_host(const struct packet *p, __u32 flags)
{
	if (p->group || !p->family || flags & CONFIG_ALL_OURS)
		return 1;
	if (p->family == 4 && be32(p->dst[0]) >> 28 >= 14)
		return 1;
	if (p->family == 6 && (p->dst[0] & be32(0xff000000)) == be32(0xff000000))
		return 1;
	return slot_of(p, p->dst, flags) == SLOT_HOST;
}
