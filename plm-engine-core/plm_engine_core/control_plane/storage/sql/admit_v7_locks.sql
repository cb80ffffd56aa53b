-- The contract is as before, but for a command that names a lock: what takes it is in engine_admit_otherwise_v6.
-- Locks, always in this order: policy and halt scopes (shared), run, ticket or approval scope, resource lock, budgets from
-- narrow to wide, grant, stream head.
CREATE OR REPLACE FUNCTION engine_admit_v7(c jsonb) RETURNS jsonb
LANGUAGE plpgsql VOLATILE SECURITY INVOKER SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    v_tenant   uuid := engine_enter_v2((c ->> 'tenant_id')::uuid);
    v_run_id   uuid := (c ->> 'run_id')::uuid;
    v_step     integer := (c ->> 'step_index')::integer;
    v_attempt  integer := (c ->> 'attempt')::integer;
    v_grant    jsonb := c -> 'grant';
    v_grant_id uuid := (v_grant ->> 'id')::uuid;
    v_decision jsonb := c -> 'decision';
    v_begins   boolean := (c ->> 'begin')::boolean;
    v_run      record;
    v_books    record;
    v_now      timestamptz;
    v_begun    timestamptz;
    v_expires  timestamptz;
    v_verdict  jsonb;
    v_answer   jsonb;
    v_event    jsonb;
    v_seq      bigint;
BEGIN
    -- PostgreSQL works a row's columns out, in their order, before it locks it: first come the locks above the run, as what it
    -- belongs to never changes, and then the clock is read.
    SELECT run_group_id AS group_id, agent_id, num_nulls(
            pg_advisory_xact_lock_shared(hashtextextended('policy', 0)),
            pg_advisory_xact_lock_shared(hashtextextended('halt/system', 0)),
            pg_advisory_xact_lock_shared(hashtextextended('halt/tenant/' || v_tenant, 0)),
            pg_advisory_xact_lock_shared(hashtextextended('halt/agent/' || v_tenant || '/' || agent_id, 0)),
            pg_advisory_xact_lock_shared(hashtextextended('halt/run_group/' || run_group_id, 0)),
            pg_advisory_xact_lock_shared(hashtextextended('halt/run/' || run_id, 0)),
            pg_advisory_xact_lock_shared(hashtextextended('halt/capability/' || v_tenant || '/' || (c ->> 'capability'), 0))),
           fencing_token = (c ->> 'fencing_token')::bigint AND state = 'running' AND lease_expires_at > clock_timestamp() AS held,
           cancel_requested_at IS NOT NULL AS cancelling
        INTO v_run FROM run_states WHERE tenant_id = v_tenant AND run_id = v_run_id FOR UPDATE;
    SELECT EXISTS (SELECT FROM halts_system WHERE lifted_at IS NULL)
               OR EXISTS (SELECT FROM halts WHERE tenant_id = v_tenant AND lifted_at IS NULL) AS halts,
           (SELECT digest FROM policy_activations WHERE role = 'active' ORDER BY number DESC LIMIT 1) AS policy,
           i.digest, i.result
        INTO v_books FROM (SELECT) AS one LEFT JOIN idempotency_records AS i
            ON i.tenant_id = v_tenant AND i.operation = 'admit' AND i.command_id = c ->> 'command_id';

    IF v_books.digest IS NOT NULL THEN
        RETURN engine_recalled_v5(c, v_books.digest, v_books.result);
    END IF;
    IF v_run.held IS NOT TRUE THEN
        PERFORM engine_hold_run_v1(v_tenant, v_run_id, (c ->> 'fencing_token')::bigint, true);  -- says what is amiss
    END IF;
    IF v_books.policy <> c ->> 'policy_digest' THEN
        -- Nothing is written, not even this answer: the same command may come again, decided anew.
        RETURN jsonb_build_object('status', 'policy_changed', 'message', format(
            'policy %s decided, and meanwhile policy %s was activated',
            left(c ->> 'policy_digest', 12), left(v_books.policy, 12)));
    END IF;
    IF v_decision ->> 'outcome' IS DISTINCT FROM 'allow' OR v_books.halts OR (v_begins AND v_run.cancelling) OR c ? 'lock' THEN
        RETURN engine_admit_otherwise_v6(c, v_run.group_id, v_run.agent_id, v_run.cancelling, v_books.halts, NULL);
    END IF;
    v_verdict := engine_reserve_v4(v_tenant, c -> 'reserve');
    IF NOT v_verdict ? 'reserved' THEN
        RETURN engine_admit_otherwise_v6(c, v_run.group_id, v_run.agent_id, v_run.cancelling, v_books.halts, v_verdict);
    END IF;

    v_now := clock_timestamp();
    v_begun := CASE WHEN v_begins THEN v_now END;
    v_expires := v_now + make_interval(secs => (v_grant ->> 'seconds')::double precision);
    WITH attempt AS (
        INSERT INTO run_steps (tenant_id, run_id, step_index, attempt, step_id, step_key, capability, resource, arguments,
                arguments_digest, executor_kind, state, decision, grant_id, started_at)
            VALUES (v_tenant, v_run_id, v_step, v_attempt, c ->> 'step_id', c ->> 'step_key', c ->> 'capability',
                c ->> 'resource', c -> 'arguments', c ->> 'digest', c ->> 'executor_kind',
                CASE WHEN v_begins THEN 'running' ELSE 'granted' END, v_decision, v_grant_id, v_begun)
            ON CONFLICT (tenant_id, run_id, step_index, attempt) DO NOTHING RETURNING grant_id)
    INSERT INTO grants (tenant_id, id, run_id, step_index, attempt, digest, policy_digest, span_id, fencing_token,
            state, issued_at, begun_at, expires_at, reserved)
        SELECT v_tenant, grant_id, v_run_id, v_step, v_attempt, c ->> 'digest', c ->> 'policy_digest', v_grant ->> 'span_id',
            (c ->> 'fencing_token')::bigint, CASE WHEN v_begins THEN 'begun' ELSE 'issued' END, v_now, v_begun, v_expires,
            v_verdict -> 'reserved'
        FROM attempt;
    IF NOT FOUND THEN  -- it waited for approval, or was decided before
        RETURN engine_admit_otherwise_v6(c, v_run.group_id, v_run.agent_id, v_run.cancelling, v_books.halts, v_verdict);
    END IF;

    v_answer := jsonb_strip_nulls(jsonb_build_object('reason', v_decision -> 'reason', 'message', v_decision -> 'message',
        'rule', v_decision -> 'rule', 'unblock', v_decision -> 'unblock', 'guidance', v_decision -> 'guidance',
        'retry_after_ms', v_decision -> 'retry_after_ms', 'status', 'granted', 'grant_id', v_grant_id,
        'span_id', v_grant -> 'span_id', 'expires_at', v_expires));
    v_event := jsonb_strip_nulls(jsonb_build_object('step', v_step, 'step_id', c -> 'step_id',
        'attempt', v_attempt, 'capability', c -> 'capability', 'resource', c -> 'resource',
        'digest', c -> 'digest', 'policy_digest', c -> 'policy_digest', 'decision', v_decision,
        'answer', v_answer, 'reserved', v_verdict -> 'reserved'));
    IF v_begins THEN
        v_seq := engine_append_events_v1(v_tenant, 'run/' || v_run_id, c ->> 'actor', ARRAY['step_granted', 'step_started'],
            ARRAY[v_event, jsonb_build_object('step', v_step, 'attempt', v_attempt, 'grant_id', v_grant_id)]);
        v_answer := v_answer || '{"replayed": false, "begun": true}';
    ELSE
        v_seq := engine_append_event_v3(v_tenant, 'run/' || v_run_id, 'step_granted', c ->> 'actor', v_event);
        v_answer := v_answer || '{"replayed": false}';
    END IF;
    INSERT INTO idempotency_records (tenant_id, operation, command_id, digest, result)
        VALUES (v_tenant, 'admit', c ->> 'command_id', c ->> 'command_digest', v_answer);
    RETURN v_answer;
END
$$;
