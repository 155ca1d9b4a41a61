"""Operations on paged KV, one folder an op: `api` picks a backend, `reference` defines it.

All of them take the pages of one layer, `[num_pages, 2, kv_heads, page_size, head_dim]`
(axis 1: 0 = K, 1 = V), and read every size off the array's shape. Page 0 is never handed out:
it takes the writes of padding, and page tables point at it where they have no page.
"""
