# C types for lexer.py; the source stays there.
cimport cython

cdef int _END, _SPACE, _COMMENT, _ERROR, _NUL, _WORD, _QUOTED, _STRING, _NUMBER, _PARAM
cdef int _OPERATOR, _PUNCT, _LPAREN, _RPAREN, _SEMICOLON, _MAX_OPERATOR


cdef class Lexer:
    cdef readonly str text
    cdef readonly bint conforming
    cdef readonly int kind
    cdef readonly Py_ssize_t start
    cdef public Py_ssize_t end
    cdef readonly Py_ssize_t length
    cdef readonly Py_ssize_t depth
    cdef readonly Py_ssize_t body
    cdef Py_ssize_t _singles
    cdef int _create
    cdef int _after

    @cython.locals(kind=int)
    cpdef int advance(self) except -1

    @cython.locals(text=str, n=Py_ssize_t, i=Py_ssize_t, j=Py_ssize_t, c=Py_UCS4, kind=int)
    cdef int _read(self) except -1

    @cython.locals(text=str, n=Py_ssize_t, kind=int)
    cdef int _prefixed(self, Py_UCS4 c, Py_ssize_t j) except -1

    cdef int _finish_string(self, Py_ssize_t end) except -1

    @cython.locals(text=str, n=Py_ssize_t, first=Py_ssize_t)
    cdef int _finish_quoted(self, Py_ssize_t j) except -1

    @cython.locals(text=str, n=Py_ssize_t, k=Py_ssize_t, tag=str)
    cdef int _dollar(self, Py_ssize_t j) except -1

    @cython.locals(text=str, n=Py_ssize_t, c=Py_UCS4, special=bint, tail=Py_ssize_t)
    cdef int _operator(self, Py_ssize_t i, Py_ssize_t j) except -1

    @cython.locals(after=int)
    cdef int _track(self, int kind) except -1

    @cython.locals(length=Py_ssize_t, word=str)
    cdef int _track_word(self) except -1


cdef bint _starts_word(Py_UCS4 c) noexcept

@cython.locals(c=Py_UCS4)
cdef Py_ssize_t _word_end(str text, Py_ssize_t j, Py_ssize_t n) except -2

cdef Py_ssize_t _line_end(str text, Py_ssize_t j, Py_ssize_t n) except -2

@cython.locals(depth=Py_ssize_t, close=Py_ssize_t, opening=Py_ssize_t)
cdef Py_ssize_t _comment_end(str text, Py_ssize_t j, Py_ssize_t n) except -2

@cython.locals(next_part=Py_ssize_t)
cdef Py_ssize_t _string_end(str text, Py_ssize_t j, Py_ssize_t n, bint escapes, bint doubled) except -2

@cython.locals(c=Py_UCS4, line_break=bint)
cpdef Py_ssize_t continuation(str text, Py_ssize_t j, Py_ssize_t n) except -2

@cython.locals(c=Py_UCS4)
cdef Py_ssize_t _digits_end(str text, Py_ssize_t j, Py_ssize_t n) except -2

@cython.locals(c=Py_UCS4, k=Py_ssize_t)
cdef Py_ssize_t _based_end(str text, Py_ssize_t j, Py_ssize_t n, Py_UCS4 base) except -2

@cython.locals(j=Py_ssize_t, k=Py_ssize_t)
cdef Py_ssize_t _number_end(str text, Py_ssize_t i, Py_ssize_t n) except? -2
