;; A plugin that reads nothing of an event, keeps it and names no recipient.
(module
  (memory (export "memory") 2)
  (global $free (mut i32) (i32.const 1024))

  ;; Allocates memory for the texts of an event; each answer frees all of it.
  (func (export "cabi_realloc") (param $old i32) (param $old_size i32) (param $align i32) (param $size i32) (result i32)
    (local $at i32)
    (local.set $at (i32.and (i32.add (global.get $free) (i32.const 7)) (i32.const -8)))
    (global.set $free (i32.add (local.get $at) (local.get $size)))
    (local.get $at))

  ;; The memory holds only zeros: empty texts and lists, no schema, ok, keep and no route.
  (func $answer (result i32)
    (global.set $free (i32.const 1024))
    (i32.const 16))

  (func (export "pointsman:plugin/lifecycle@0.1.0#describe") (result i32) (call $answer))
  (func (export "pointsman:plugin/lifecycle@0.1.0#configure") (param i32 i32) (result i32) (call $answer))

  ;; id, source, type, subject (with a presence flag), time; priority, attributes, data (with its
  ;; kind). Texts and lists are passed as address and length.
  (type $decide (func
    (param i32 i32 i32 i32 i32 i32 i32 i32 i32 i64)
    (param i32 i32 i32 i32 i32 i32)
    (result i32)))
  (func (export "pointsman:plugin/filter@0.1.0#evaluate") (type $decide) (call $answer))
  (func (export "pointsman:plugin/router@0.1.0#resolve") (type $decide) (call $answer)))
