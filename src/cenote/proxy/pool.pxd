cimport cython
from cenote.core.histogram cimport Histogram
from cenote.core.machine cimport Machine
from cenote.core.slot cimport Slot, Waiter
from cenote.proxy.roles cimport Borrower, Lender
from cenote.proxy.server cimport ServerConnection

cdef class ProxyPool(Lender):
    cdef public object daemon
    cdef public str database
    cdef public str user
    cdef public object options
    cdef public str mode
    cdef public bint session_mode
    cdef public bint statement_mode
    cdef public bint reads_nothing
    cdef public double acquire_timeout
    cdef public Machine machine
    cdef public object works
    cdef public object budget
    cdef public set servers
    cdef public long clients
    cdef public dict statements
    cdef public dict settings
    cdef public dict ways
    cdef public dict welcome
    cdef public dict base
    cdef public dict base_items
    cdef public object stained
    cdef public bint audits
    cdef public bint audits_all
    cdef public dict audited
    cdef public object customs
    cdef public bint customs_due
    cdef public bint minds_sequences
    cdef public long max_pinned
    cdef public bint refuses_pins
    cdef public dict ledger
    cdef public long unlisted
    cdef public object watch
    cdef public long incidents
    cdef public long audits_done
    cdef public long conversions
    cdef public long long transactions
    cdef public long long queries
    cdef public long long errors
    cdef public long long bytes_from_clients
    cdef public long long bytes_to_clients
    cdef public long recovered_plans
    cdef public long replays
    cdef public dict pins
    cdef public long pinned
    cdef public object listener
    cdef public Histogram transaction_s
    cdef public Histogram query_s

    @cython.locals(now=double, server=ServerConnection, slot=Slot)
    cpdef borrow(self, Borrower client)
    cdef _lend(self, ServerConnection server, Borrower client, double now)
    @cython.locals(now=double, server=ServerConnection)
    cpdef settled(self, Borrower client, lent)
    @cython.locals(now=double, server=ServerConnection)
    cpdef in_transaction(self, Borrower client, lent)
    @cython.locals(machine=Machine, effects=list, client=Borrower, server=ServerConnection, slot=Slot)
    cpdef perform(self)
    cdef _account(self, ServerConnection server, double now)
    cdef _part(self, Borrower client, ServerConnection server)
    cpdef bint convert(self, Borrower client, ServerConnection server, bint guards=*) except -1
    cdef object _way(self, carried, wanted)
    cpdef went_first(self, ServerConnection server, settings, error)
