# SPDX-License-Identifier: Apache-2.0
"""`opd serve-teacher`: a teacher's laws over HTTP. docs/teacher_server.md is its page.

serve.py     from options to a running server
app.py       the endpoints
connections.py  connections that send no request
requests.py  what came off the wire, checked before anything uses it
batcher.py   requests merged up to a token budget, one worker, a bounded queue
engine.py    sequences in, laws out: the only file that touches the model
projection.py  the head on its leading singular directions
replies.py   results as binary frames, or as JSON
monitor.py   Prometheus metrics
"""
