"""Reports: results as JSON, as pages that people read, and several of them side by side.

`results` is the shape of results.json, its reader and its writer; `page.write` makes the report of one erased model,
`compare` puts methods side by side, and `pool` makes one row of several erasures by one method.
"""
