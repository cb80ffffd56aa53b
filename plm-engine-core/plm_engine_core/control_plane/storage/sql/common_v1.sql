-- What every function of the control plane starts and ends with.

-- Binds the transaction to one tenant. On a caller's own connection it refuses to move a transaction from one tenant to
-- another, and any isolation but READ COMMITTED: a snapshot older than the halt lock would miss a committed halt.
CREATE FUNCTION engine_enter_v1(p_tenant uuid) RETURNS void
LANGUAGE plpgsql VOLATILE SECURITY INVOKER SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    v_bound text := NULLIF(current_setting('app.tenant_id', true), '');
BEGIN
    IF current_setting('transaction_isolation') <> 'read committed' THEN
        RAISE EXCEPTION USING ERRCODE = 'PLI01', MESSAGE = format(
            'admission and settlement need READ COMMITTED, this transaction is %s',
            upper(current_setting('transaction_isolation')));
    END IF;
    IF v_bound IS NOT NULL AND v_bound::uuid <> p_tenant THEN
        RAISE EXCEPTION USING ERRCODE = 'PLT01', MESSAGE = 'this transaction is already bound to another tenant';
    END IF;
    PERFORM set_config('app.tenant_id', p_tenant::text, true);
END
$$;

-- SHA-256 over length-prefixed fields, so that no two different events share one byte string.
CREATE FUNCTION engine_event_hash_v1(
    p_tenant uuid, p_stream text, p_seq bigint, p_prev bytea, p_kind text, p_actor text, p_at timestamptz, p_payload text
) RETURNS bytea
LANGUAGE sql IMMUTABLE SECURITY INVOKER SET search_path = pg_catalog, public, pg_temp AS $$
    SELECT sha256(
        int4send(octet_length(t.tenant)) || t.tenant || int4send(octet_length(t.stream)) || t.stream || int8send(p_seq)
        || int4send(octet_length(p_prev)) || p_prev || int4send(octet_length(t.kind)) || t.kind
        || int4send(octet_length(t.actor)) || t.actor || int8send((extract(epoch FROM p_at) * 1000000)::bigint)
        || int4send(octet_length(t.payload)) || t.payload)
    FROM (SELECT convert_to(p_tenant::text, 'UTF8') AS tenant, convert_to(p_stream, 'UTF8') AS stream,
                 convert_to(p_kind, 'UTF8') AS kind, convert_to(p_actor, 'UTF8') AS actor,
                 convert_to(p_payload, 'UTF8') AS payload) AS t
$$;

-- Appends one event to a dense hash chain and answers its sequence. The head row is the last lock of its transaction.
CREATE FUNCTION engine_append_event_v1(p_tenant uuid, p_stream text, p_kind text, p_actor text, p_payload jsonb)
RETURNS bigint
LANGUAGE plpgsql VOLATILE SECURITY INVOKER SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    v_seq  bigint;
    v_prev bytea;
    v_hash bytea;
    v_at   timestamptz;
    v_text text := p_payload::text;
BEGIN
    SELECT last_seq + 1, last_hash INTO v_seq, v_prev FROM event_streams
        WHERE tenant_id = p_tenant AND stream = p_stream FOR UPDATE;
    IF NOT FOUND THEN
        INSERT INTO event_streams (tenant_id, stream) VALUES (p_tenant, p_stream) ON CONFLICT DO NOTHING;
        SELECT last_seq + 1, last_hash INTO v_seq, v_prev FROM event_streams
            WHERE tenant_id = p_tenant AND stream = p_stream FOR UPDATE;
    END IF;
    v_at := clock_timestamp();
    v_hash := engine_event_hash_v1(p_tenant, p_stream, v_seq, v_prev, p_kind, p_actor, v_at, v_text);
    INSERT INTO events (tenant_id, stream, seq, prev_hash, hash, kind, actor, occurred_at, payload)
        VALUES (p_tenant, p_stream, v_seq, v_prev, v_hash, p_kind, p_actor, v_at, v_text);
    UPDATE event_streams SET last_seq = v_seq, last_hash = v_hash WHERE tenant_id = p_tenant AND stream = p_stream;
    RETURN v_seq;
END
$$;

-- Shared locks on every halt scope above a run, from wide to narrow. A halt takes its scope exclusively, so nothing that
-- passed this line can commit after a halt that has committed.
CREATE FUNCTION engine_lock_halts_v1(p_tenant uuid, p_run uuid) RETURNS void
LANGUAGE plpgsql VOLATILE SECURITY INVOKER SET search_path = pg_catalog, public, pg_temp AS $$
BEGIN
    PERFORM pg_advisory_xact_lock_shared(hashtextextended('halt/system', 0));
    PERFORM pg_advisory_xact_lock_shared(hashtextextended('halt/tenant/' || p_tenant, 0));
    PERFORM pg_advisory_xact_lock_shared(hashtextextended('halt/run/' || p_run, 0));
END
$$;

-- The widest standing halt over a run, or null. Call it in a statement after engine_lock_halts_v1.
CREATE FUNCTION engine_standing_halt_v1(p_tenant uuid, p_run uuid) RETURNS jsonb
LANGUAGE sql VOLATILE SECURITY INVOKER SET search_path = pg_catalog, public, pg_temp AS $$
    SELECT h.halt FROM (
        SELECT 0 AS width, jsonb_build_object('id', id, 'scope', 'system', 'epoch', epoch, 'reason', reason) AS halt
            FROM halts_system WHERE lifted_at IS NULL
        UNION ALL
        SELECT CASE scope WHEN 'tenant' THEN 1 ELSE 2 END,
               jsonb_build_object('id', id, 'scope', scope, 'epoch', epoch, 'reason', reason)
            FROM halts WHERE tenant_id = p_tenant AND lifted_at IS NULL
                AND ((scope = 'tenant' AND scope_id = p_tenant) OR (scope = 'run' AND scope_id = p_run))
    ) AS h ORDER BY h.width LIMIT 1
$$;

-- Locks the run and refuses a caller whose fencing token was replaced. New effects need a live lease as well; recording
-- what already happened does not, as long as nobody took the run over.
CREATE FUNCTION engine_hold_run_v1(p_tenant uuid, p_run uuid, p_fencing bigint, p_live boolean) RETURNS run_states
LANGUAGE plpgsql VOLATILE SECURITY INVOKER SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    v_run run_states;
BEGIN
    SELECT * INTO v_run FROM run_states WHERE tenant_id = p_tenant AND run_id = p_run FOR UPDATE;
    IF NOT FOUND THEN
        RAISE EXCEPTION USING ERRCODE = 'PLN01', MESSAGE = 'not found', TABLE = 'run', DETAIL = p_run;
    END IF;
    IF v_run.fencing_token <> p_fencing OR v_run.state <> 'running'
       OR (p_live AND COALESCE(v_run.lease_expires_at <= clock_timestamp(), true)) THEN
        RAISE EXCEPTION USING ERRCODE = 'PLF01', MESSAGE = format(
            'the lease of run %s is no longer held with fencing token %s', p_run, p_fencing);
    END IF;
    RETURN v_run;
END
$$;
