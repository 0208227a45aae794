cimport cython
from cenote.proxy.peer cimport Peer
from cenote.proxy.prepared cimport Statement
from cenote.proxy.replies cimport Entry, ReplyQueue
from cenote.proxy.roles cimport Borrower, Lender

cdef int _ROW, _COPY_DATA, _NOTICE, _NOTIFICATION, _FUNCTION_RESULT, _PARAMETERS, _COPY_OUT, _COPY_IN, _COPY_DONE
cdef int _COMPLETE, _EMPTY, _SUSPENDED, _DESCRIPTION, _NO_DATA, _PARSED, _BOUND, _CLOSED
cdef int _READY, _ERROR, _STATUS, _IDLE, _FAILED
cdef long _HOLD_BYTES

cdef int _OWED_NAMED_PARSE, _OWED_UNNAMED_PARSE, _OWED_OWN_BRING
cdef int _OWED_NONE, _OWED_QUERY, _OWED_SYNC, _OWED_PARSE, _OWED_BIND, _OWED_DESCRIBE, _OWED_EXECUTE
cdef int _OWED_CLOSE
cdef int _OWED_SWALLOWED, _OWED_OWN_PARSE, _OWED_OWN_STEP, _OWED_OWN_CLOSE, _OWED_OWN_QUERY, _OWED_OWN_SYNC, _OWED_SYNTHETIC_CLOSE, _OWED_SYNTHETIC

cdef class ServerConnection(Peer):
    cdef public object pool
    cdef public object slot
    cdef public Borrower client
    cdef public ReplyQueue replies
    cdef public int status
    cdef public object settings
    cdef public object stain
    cdef public bint expires
    cdef public bint unclean
    cdef public bint sequenced
    cdef public bint audit
    cdef public dict suspects
    cdef public long long proof
    cdef public set hints
    cdef public bint defines
    cdef public dict defaults
    cdef public dict known
    cdef public dict names
    cdef public object unnamed
    cdef public long taken_at
    cdef public long named_at
    cdef public long unnamed_at
    cdef public bint copying
    cdef public int early_ends
    cdef public bint skipping
    cdef public long guard
    cdef public bint answered
    cdef public object batch
    cdef public bint described
    cdef public bint replaying
    cdef public long long lease_tick
    cdef public double began_at
    cdef public double asked_at
    cdef public bytes part
    cdef public Py_ssize_t left
    cdef public bint dropping
    cdef public list finished
    cdef public bytes instead
    cdef public list binding
    cdef public object fatal
    cdef public bint told
    cdef public bint failed
    cdef public bint unparsed
    cdef public object quiet
    cdef public object farewell
    cdef public int cancels
    cdef public bint doubtful
    cdef public double cancel_wanted
    cdef public dict parameters
    cdef public long backend_pid
    cdef public bytes backend_secret
    cdef public object endpoint
    cdef public long version
    cdef public double opened_at

    @cython.locals(p="const unsigned char*", n=Py_ssize_t, i=Py_ssize_t, start=Py_ssize_t, end=Py_ssize_t,
                   begin=Py_ssize_t, head=bint, length=long, kind=int, owed=int, ready=bint, theirs=bint, drop=bint, fresh=bint, client=Borrower,
                   replies=ReplyQueue, entry=Entry)
    cpdef received(self, bytes data)
    cdef bint _only_prepared(self, Borrower client) except -1
    @cython.locals(client=Borrower, entry=Entry)
    cdef _ready(self, bint theirs)
    @cython.locals(replies=ReplyQueue, client=Borrower)
    cdef bint _error(self, bytes body, int owed, bint first) except -1
    cdef bint _last_words(self, int owed, bint first) except -1
    cdef _undo(self, list dropped, int failed)
    cdef _parameter(self, bytes body)
    cdef _broken(self, str what)
    cpdef know(self, Statement statement, bytes name)
    cpdef forget(self, Statement statement)
    cpdef forget_all(self)
    cpdef inject(self, bytes sql, done, list rows=*, bint tells=*)
    cpdef convert_first(self, bytes query, settings)
    cpdef close_statement(self, Statement statement, bytes name)
    cpdef discard_sequences(self, bytes name)
    cpdef sync(self)
    cpdef refuse(self, bytes error)
    cpdef copy_ended(self)
    cpdef bint rests(self)
