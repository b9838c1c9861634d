"""`topup doctor` asks whether everything is as the design demands.

Read in this order, which is the order of one examination:

    command.py      the command line; its exit status
    cluster.py      a live cluster, or rendered manifests -> documents
    documents.py    what is read of them, and what refers to what
    examination.py  every check, in one order
    source.py topics.py pods.py scaling.py   what the documents say
    ledger.py api.py   what the database and the recharge API say
    diagnosis.py    one line a finding, with what to do

The kubernetes client is an extra, imported where a cluster is asked.
"""
